"""Tests of bindings/ltn.py: python3 tests/binding.py TEXT_MODEL IDS_MODEL LTN_RUN FOLDER. Prints "pass NAME" or
"fail NAME" for each, with the reason on stderr."""
import array
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "bindings"))
import ltn

text_model, ids_model, ltn_run, folder = sys.argv[1:]
engine = ltn.Engine(text_model, device="cpu", n_threads=2)
ids_engine = ltn.Engine(ids_model, device="cpu", n_threads=1)


def begun(text="hello", seed=1):
    session = engine.session()
    session.seed(seed)
    session.feed(text)
    return session


def run(*arguments):
    command = [ltn_run, "-q", "--device", "cpu", "-m", text_model, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()


def same(a, b):
    assert a == b, f"{a!r} is not {b!r}"


def near(a, b):
    """As near as logits of one text in two splits are."""
    assert len(a) == len(b) and all(abs(x - y) < 1e-5 * max(map(abs, b)) for x, y in zip(a, b)), f"{a} is not {b}"


def fails(status, text, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except ltn.Error as error:
        assert error.status == status and text in str(error), f"{error.status}: {error}"
    else:
        raise AssertionError("it did not fail")


def test_engine_says_what_it_is():
    info = engine.info
    assert info["vocab_size"] == 360 and info["has_tokenizer"] is True and info["bos_id"] == 1, info
    assert info["backend"].startswith("CPU") and len(info["checksum"]) == 32, info
    assert ltn.version().count(".") == 2
    assert ids_engine.info["has_tokenizer"] is False


def test_progress_is_told():
    seen = []
    ltn.Engine(text_model, device="cpu", progress=lambda done, total: seen.append((done, total))).close()
    assert seen and seen[-1][0] == seen[-1][1], seen


def test_text_to_ids_and_back():
    for text in "hello", "", "Größe 漢字 \0 x", " two  spaces":
        ids = engine.tokenize(text)
        assert all(type(i) is int for i in ids)
        same(engine.detokenize(ids), text)
    fails(ltn.ERR_UNSUPPORTED, "no tokenizer", ids_engine.tokenize, "a")


def test_generate_gives_what_ltn_run_prints():
    for seed in 1, 2**64 - 1:
        text, result = begun(seed=seed).generate(60)
        same(text, run("-p", "hello", "-n", "60", "--seed", str(seed)))
        assert result.n_tokens == 60 and result.end == ltn.END_LENGTH
    text, _ = begun().generate(40, temperature=0.5, top_k=7, top_p=0.9, min_p=0.01)
    same(text, run(*"-p hello -n 40 --seed 1 --temp 0.5 --top-k 7 --top-p 0.9 --min-p 0.01".split()))


def test_stream_gives_what_generate_does():
    for seed in range(5):
        session, streamed = begun(seed=seed), begun(seed=seed)
        text, _ = session.generate(150)
        same("".join(streamed.stream(150)), text)
        same(streamed.position, session.position)
        same(streamed.logits(), session.logits())


def test_a_stream_may_be_left_and_gone_on_with():
    session, whole = begun(), begun()
    text = ""
    for piece in session.stream():
        text += piece
        if len(text) > 30:
            break
    text += "".join(session.stream(50))
    same(text, whole.generate(session.position - whole.position)[0])


def test_between_pieces_a_session_is_free():
    session, saved, text = begun(), None, ""
    for piece in session.stream(40):
        text += piece
        if saved is None and len(text) > 10:
            saved, so_far = session.fork(), text
            assert session.position > 0 and len(session.logits()) == 360
    same(so_far + "".join(saved.stream(session.position - saved.position)), text)


def test_pieces_and_their_ids():
    ids, pieces, session = [], [], begun()
    text, result = session.generate(50, lambda id_, piece: (ids.append(id_), pieces.append(piece)))
    same("".join(pieces), text)
    same(len([i for i in ids if i >= 0]), result.n_tokens)
    again = engine.session()
    again.feed("hello")
    again.feed([i for i in ids if i >= 0])
    near(again.logits(), session.logits())


def test_a_piece_function_may_stop():
    def piece(id_, text):
        seen.append(text)
        if len(seen) == 5:
            raise ltn.Stop
    seen, session = [], begun()
    before = session.position
    text, result = session.generate(50, piece)
    assert result.end == ltn.END_STOPPED and result.n_tokens == 5 and session.position == before + 5
    assert text.startswith("".join(seen[:5]))


def test_what_a_piece_function_raises_comes_out():
    def piece(id_, text):
        raise KeyError("mine")
    for run_ in (lambda: begun().generate(5, piece),
                 lambda: ltn.Engine(text_model, device="cpu", progress=piece)):
        try:
            run_()
        except KeyError as error:
            same(error.args, ("mine",))
        else:
            raise AssertionError("nothing came out")


def test_stop_strings():
    text, _ = begun(seed=5).generate(300)
    stop = text[40:43]
    cut, result = begun(seed=5).generate(300, stop=["not in this text", stop])
    same(cut, text[:text.index(stop)])
    same(result.end, ltn.END_STRING)
    same(begun(seed=5).generate(300, stop=stop)[0], cut)
    fails(ltn.ERR_INPUT, "", begun().generate, 5, stop=[""])


def test_logits_and_samples():
    session = begun()
    logits = session.logits()
    assert isinstance(logits, array.array) and logits.typecode == "f" and len(logits) == 360
    likeliest = max(range(360), key=lambda i: (logits[i], -i))
    same(session.sample(temperature=0), likeliest)
    try:
        session.sample(temprature=0)
    except TypeError as error:
        assert "temprature" in str(error)
    else:
        raise AssertionError("an unknown field was taken")
    fails(ltn.ERR_INPUT, "", engine.session().logits)


def test_penalties_bias_and_typical():
    options = "--typical 0.8 --repeat-penalty 1.3 --repeat-last 20 --presence-penalty 0.2 --frequency-penalty 0.1"
    text, _ = begun().generate(40, typical=0.8, repeat_penalty=1.3, repeat_last=20, presence_penalty=0.2,
                               frequency_penalty=0.1)
    same(text, run(*"-p hello -n 40 --seed 1".split(), *options.split()))
    ids = []
    begun().generate(5, lambda id_, _: ids.append(id_), bias={77: 1000.0}, ignore_eos=True)
    same(ids[:5], [77] * 5)
    same(begun().sample(bias={77: 1000.0, 78: 2000.0}), 78)
    fails(ltn.ERR_INPUT, "", begun().sample, bias={360: 1.0})
    fails(ltn.ERR_INPUT, "bias", begun().sample, bias={2**32: 1.0})
    fails(ltn.ERR_INPUT, "repeat_last", begun().sample, repeat_last=ltn.MAX_REPEAT_LAST + 1)


def test_what_was_drawn_from_is_told():
    def drawn(id_, logits):
        assert len(logits) == 360
        told.append((id_, session.position))
        expected.append(max(range(360), key=lambda i: (logits[i], -i)))
    told, expected, session = [], [], begun()
    position = session.position
    session.generate(5, drawn=drawn, temperature=0, ignore_eos=True)
    same(told, [(id_, position + i) for i, id_ in enumerate(expected)])


def test_draws_may_be_left_out():
    session = begun()
    fork, same_fork = session.fork(), session.fork()
    fork.skip(ltn.FORK_DRAWS)
    text = session.generate(60)[0]
    same(same_fork.generate(60)[0], text)
    assert fork.generate(60)[0] != text


def test_feeds_may_be_split():
    text = "The sea, the sea. " * 20
    whole, ids, split = begun(text), engine.session(), engine.session(chunk_rows=7)
    ids.feed(engine.tokenize(text))
    data = text.encode()
    for i in range(0, len(data), 11):
        split.feed_text(data[i:i + 11])
    split.end_text()
    same(ids.logits(), whole.logits())
    same(split.position, whole.position)
    near(split.logits(), whole.logits())


def test_score_gives_every_row():
    def each(position, rows, logits):
        got.extend(logits)
        places.append((position, rows))
    ids, got, places = [5, 17, 9, 30, 31], array.array("f"), []
    session = ids_engine.session(chunk_rows=2, score_rows=2)
    session.score(ids, each)
    assert places[0][0] == 0 and sum(rows for _, rows in places) == 5, places
    vocabulary = ids_engine.info["vocab_size"]
    same(got[-vocabulary:], session.logits())

    def broken(*_):
        raise KeyError("mine")
    try:
        session.score(ids, broken)
    except KeyError:
        return
    raise AssertionError("nothing came out")


def test_forks_go_their_own_ways():
    session = begun()
    fork = session.fork()
    same(fork.generate(30)[0], session.generate(30)[0])
    position = session.position
    fork.feed("something else")
    same(session.position, position)


def test_save_and_load():
    path = folder + "/python.session"
    session, resumed = begun(), engine.session()
    session.generate(10, keep_open=True)
    session.save(path)
    same(os.path.getsize(path), engine.info["session_bytes"])
    with open(path, "rb") as file:
        same(session.to_bytes(), file.read())
    resumed.load(path)
    memory = engine.session()
    memory.from_bytes(session.to_bytes())
    text, _ = session.generate(40)
    same(resumed.generate(40)[0], text)
    same(memory.generate(40)[0], text)
    same(run("--load", path, "-n", "40"), text)
    fails(ltn.ERR_INPUT, "", memory.from_bytes, resumed.to_bytes()[:-1])
    fails(ltn.ERR_INPUT, "", ids_engine.session().load, path)
    fails(ltn.ERR_IO, "none", resumed.load, folder + "/none")


def test_a_batch_steps_several_sessions():
    alone, together = [], []
    for i in range(3):
        for sessions in (alone, together):
            sessions.append(begun())
            sessions[-1].feed([5 + i] * (1 + 40 * i))
    with engine.batch(2) as batch:
        batch.step(together)
        for a, b in zip(alone, together):
            same(b.logits(), a.logits())
            same(b.position, a.position)
        fails(ltn.ERR_INPUT, "session 1", batch.step, [together[0], ids_engine.session()])
    fails(ltn.ERR_INPUT, "batch", engine.batch, 0)


def test_reset_starts_over():
    session = begun()
    first = session.generate(20)[0]
    session.reset()
    same(session.position, 0)
    session.feed("hello")
    same(session.generate(20)[0], first)


def test_bad_input_is_refused():
    fails(ltn.ERR_IO, "none.ltn", ltn.Engine, folder + "/none.ltn")
    fails(ltn.ERR_INPUT, "device", ltn.Engine, text_model, device="gpu")
    session = engine.session()
    fails(ltn.ERR_INPUT, "token 1", session.feed, [1, 360])
    fails(ltn.ERR_INPUT, "token 0", session.feed, [2**32 + 5])  # not token 5
    fails(ltn.ERR_INPUT, "seed", session.seed, 2**64)
    fails(ltn.ERR_INPUT, "seed", session.seed, -1)
    fails(ltn.ERR_INPUT, "chunk_rows", engine.session, chunk_rows=2**32)
    fails(ltn.ERR_INPUT, "top_k", begun().sample, top_k=2**32)
    fails(ltn.ERR_INPUT, "max_tokens", begun().generate, 2**64)
    same(session.position, 0)


def test_closed_objects_say_so():
    own = ltn.Engine(text_model, device="cpu")
    session = own.session()
    own.close()  # its sessions with it
    own.close()
    for call in own.session, session.logits, lambda: session.position, lambda: own.info:
        try:
            call()
        except ValueError as error:
            assert "closed" in str(error)
        else:
            raise AssertionError("it worked")
    with ltn.Engine(text_model, device="cpu") as inside, inside.session() as session:
        session.feed("a")


def test_what_nothing_refers_to_is_closed():
    session = ltn.Engine(text_model, device="cpu").session()
    session.feed("a")  # the session keeps its engine
    same(len(session.logits()), 360)
    del session
    gc.collect()


def test_sessions_of_one_engine_in_threads():
    alone = [begun(seed=i).generate(40)[0] for i in range(4)]
    together = [None] * 4

    def work(i):
        together[i] = begun(seed=i).generate(40)[0]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(together, alone)


def test_a_session_goes_from_thread_to_thread():
    session, whole = begun(), begun()
    text = []
    for _ in range(4):
        thread = threading.Thread(target=lambda: text.append(session.generate(10, keep_open=True)[0]))
        thread.start()
        thread.join()
    text.append(session.generate(0)[0])
    same("".join(text), whole.generate(40)[0])


def test_a_piece_function_may_read_its_session():
    def piece(id_, text):
        if id_ >= 0 and session.position == 20:
            seen.append((session.fork(), session.to_bytes(), session.logits()))
            session.save(folder + "/piece.session")
    session, untouched, seen = begun(), begun(), []
    text, _ = session.generate(40, piece, keep_open=True)
    same(text, untouched.generate(40, keep_open=True)[0])
    same(session.to_bytes(), untouched.to_bytes())
    (fork, data, logits), = seen
    resumed, loaded = engine.session(), engine.session()
    resumed.from_bytes(data)
    loaded.load(folder + "/piece.session")
    for other in fork, resumed, loaded:
        same(other.logits(), logits)
        rest, _ = other.generate(session.position - 20, keep_open=True)
        assert rest and text.endswith(rest), (text, rest)
        same(other.logits(), session.logits())


def test_threads_of_the_library_take_no_signals():
    blocked = []
    before = set(os.listdir("/proc/self/task"))
    own = ltn.Engine(text_model, device="cpu", n_threads=3)
    for task in set(os.listdir("/proc/self/task")) - before:
        with open(f"/proc/self/task/{task}/status") as status:
            blocked += [int(line.split()[1], 16) for line in status if line.startswith("SigBlk:")]
    own.close()
    interrupt, terminate = 1 << (signal.SIGINT - 1), 1 << (signal.SIGTERM - 1)
    assert len(blocked) == 2 and all(mask & interrupt and mask & terminate for mask in blocked), blocked
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_numpy_takes_logits():
    logits = begun().logits()
    view = memoryview(logits)  # what numpy.asarray goes by
    assert view.format == "f" and view.shape == (360,) and view.itemsize == 4


for name, test in list(globals().items()):
    if name.startswith("test_"):
        verdict = "pass"
        try:
            test()
        except BaseException:
            verdict = "fail"
            traceback.print_exc()
        print(verdict, name[5:].replace("_", " "), flush=True)
