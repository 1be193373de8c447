"""ltn from Python: one file over libltn.so, with nothing but the standard library.

    import ltn
    engine = ltn.Engine("demo.ltn")
    session = engine.session()
    session.feed("Once upon a time")
    for piece in session.stream(100):
        print(piece, end="", flush=True)

The library is $LTN_LIB, else libltn.so beside this file or one folder up, else the system's libltn.so.0.
src/ltn.h says what every call does. Its rules on threads hold here: an Engine may be used by any number of
threads, a Session by one at a time; other threads of Python run while a call computes. Objects are closed when
nothing refers to them, or by close() or `with`. Failures raise ltn.Error.
"""

import array
import ctypes
import os
import weakref
from ctypes import (POINTER, byref, c_bool, c_char, c_char_p, c_double, c_float, c_int, c_int32, c_int64,
                    c_size_t, c_uint64, c_void_p)

OK, ERR_INPUT, ERR_IO, ERR_MEMORY, ERR_DEVICE, ERR_UNSUPPORTED, ERR_STOPPED = range(7)
END_LENGTH, END_EOS, END_STRING, END_STOPPED = range(4)
MAX_REPEAT_LAST = 1024
BATCH_MAX = 4096
FORK_DRAWS = 1 << 48


class Error(Exception):
    """status is one of the ERR_ numbers; the text is one line."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Stop(Exception):
    """Raised by a piece function of generate: ends the generation in good order."""


# ---- what ltn.h declares: tests/binding_layout.py checks every line against it ------------------------------


class CError(ctypes.Structure):
    c_name = "ltn_error"
    _fields_ = [("status", c_int), ("text", c_char * 512)]


PROGRESS_FN = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint64)
LOGITS_FN = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(c_float), c_int64, c_int32, POINTER(CError))
DRAWN_FN = ctypes.CFUNCTYPE(c_int, c_void_p, c_int32, POINTER(c_float), POINTER(CError))
PIECE_FN = ctypes.CFUNCTYPE(c_int, c_void_p, c_int32, POINTER(c_char), c_size_t, POINTER(CError))


class EngineOptions(ctypes.Structure):
    c_name = "ltn_engine_options"
    _fields_ = [("device", c_char_p), ("n_threads", c_int), ("progress", PROGRESS_FN), ("progress_ctx", c_void_p),
                ("prefill", c_char_p)]


class EngineInfo(ctypes.Structure):
    c_name = "ltn_engine_info"
    _fields_ = [("vocab_size", c_int32), ("embed_dim", c_int32), ("n_layers", c_int32), ("n_heads", c_int32),
                ("head_dim", c_int32), ("bos_id", c_int32), ("eos_id", c_int32), ("n_parameters", c_uint64),
                ("weights_bytes", c_uint64), ("state_bytes", c_uint64), ("decode_bytes", c_uint64),
                ("session_bytes", c_uint64), ("chunk_rows", c_int32), ("n_threads", c_int),
                ("start_seconds", c_double), ("load_seconds", c_double), ("has_tokenizer", c_bool), ("dtype", c_char_p),
                ("backend", c_char_p), ("checksum", c_char_p),
                ("notice", c_char_p)]


class SessionOptions(ctypes.Structure):
    c_name = "ltn_session_options"
    _fields_ = [("chunk_rows", c_int32), ("score_rows", c_int32), ("batch", c_void_p)]


class LogitBias(ctypes.Structure):
    c_name = "ltn_logit_bias"
    _fields_ = [("id", c_int32), ("value", c_float)]


class Sampling(ctypes.Structure):
    c_name = "ltn_sampling"
    _fields_ = [("temperature", c_double), ("top_k", c_int32), ("top_p", c_double), ("min_p", c_double),
                ("typical", c_double), ("repeat_last", c_int32), ("repeat_penalty", c_double),
                ("presence_penalty", c_double), ("frequency_penalty", c_double), ("bias", POINTER(LogitBias)),
                ("n_bias", c_size_t)]


class GenerateOptions(ctypes.Structure):
    c_name = "ltn_generate_options"
    _fields_ = [("sampling", POINTER(Sampling)), ("max_tokens", c_int64), ("ignore_eos", c_bool),
                ("keep_open", c_bool), ("stop", POINTER(c_char_p)), ("n_stop", c_size_t), ("piece", PIECE_FN),
                ("drawn", DRAWN_FN), ("ctx", c_void_p)]


class Generated(ctypes.Structure):
    c_name = "ltn_generated"
    _fields_ = [("n_tokens", c_int64), ("end", c_int)]


STRUCTS = [CError, EngineOptions, EngineInfo, SessionOptions, LogitBias, Sampling, GenerateOptions, Generated]
_IDS, _SESSION, _ERR = POINTER(c_int32), c_void_p, POINTER(CError)
FUNCTIONS = {  # name: (result, arguments); c_void_p: an engine, a session or bytes
    "ltn_version": (c_char_p, []),
    "ltn_device_check": (c_int, [c_char_p, _ERR]),
    "ltn_engine_open": (c_int, [POINTER(c_void_p), c_char_p, POINTER(EngineOptions), _ERR]),
    "ltn_engine_close": (None, [c_void_p]),
    "ltn_engine_info": (POINTER(EngineInfo), [c_void_p]),
    "ltn_engine_tokenize": (c_int, [c_void_p, c_char_p, c_size_t, POINTER(_IDS), POINTER(c_size_t), _ERR]),
    "ltn_engine_detokenize": (c_int, [c_void_p, _IDS, c_size_t, POINTER(POINTER(c_char)), POINTER(c_size_t), _ERR]),
    "ltn_session_create": (c_int, [POINTER(c_void_p), c_void_p, POINTER(SessionOptions), _ERR]),
    "ltn_session_free": (None, [_SESSION]),
    "ltn_session_reset": (c_int, [_SESSION, _ERR]),
    "ltn_session_copy": (c_int, [_SESSION, _SESSION, _ERR]),
    "ltn_session_position": (c_int64, [_SESSION]),
    "ltn_session_feed": (c_int, [_SESSION, _IDS, c_size_t, _ERR]),
    "ltn_session_feed_text": (c_int, [_SESSION, c_char_p, c_size_t, _ERR]),
    "ltn_session_end_text": (c_int, [_SESSION, _ERR]),
    "ltn_session_logits": (c_int, [_SESSION, POINTER(POINTER(c_float)), _ERR]),
    "ltn_session_score": (c_int, [_SESSION, _IDS, c_size_t, LOGITS_FN, c_void_p, _ERR]),
    "ltn_session_save": (c_int, [_SESSION, c_char_p, _ERR]),
    "ltn_session_load": (c_int, [_SESSION, c_char_p, _ERR]),
    "ltn_session_export": (c_int, [_SESSION, c_void_p, c_size_t, _ERR]),
    "ltn_session_import": (c_int, [_SESSION, c_void_p, c_size_t, _ERR]),
    "ltn_batch_create": (c_int, [POINTER(c_void_p), c_void_p, c_int32, _ERR]),
    "ltn_batch_free": (None, [c_void_p]),
    "ltn_batch_step": (c_int, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(Sampling), _ERR]),
    "ltn_session_seed": (None, [_SESSION, c_uint64]),
    "ltn_session_skip": (None, [_SESSION, c_uint64]),
    "ltn_session_sample": (c_int, [_SESSION, POINTER(Sampling), POINTER(c_int32), _ERR]),
    "ltn_generate": (c_int, [_SESSION, POINTER(GenerateOptions), POINTER(Generated), _ERR]),
    "ltn_generation_begin": (c_int, [POINTER(c_void_p), _SESSION, POINTER(GenerateOptions), _ERR]),
    "ltn_generation_next": (c_int, [c_void_p, POINTER(c_bool), _ERR]),
    "ltn_generation_end": (None, [c_void_p, POINTER(Generated)]),
}


def _open_library():
    here = os.path.dirname(os.path.abspath(__file__))
    near = [path for path in (here + "/libltn.so", os.path.dirname(here) + "/libltn.so") if os.path.exists(path)]
    path = os.environ.get("LTN_LIB") or (near + ["libltn.so.0"])[0]
    library = ctypes.CDLL(path)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_lib = _open_library()
_free = ctypes.CDLL(None).free  # of the C library, for what ltn.h says that the caller frees
_free.restype, _free.argtypes = None, [c_void_p]


def _call(name, *arguments):
    err = CError()
    status = getattr(_lib, name)(*arguments, byref(err))
    if status != OK:
        raise Error(status, err.text.decode("utf-8", "replace"))


def _whole(what, value, kind=c_int32):
    """value, where a C integer of this kind holds it: ctypes would cut it silently."""
    if kind(value).value != value:
        raise Error(ERR_INPUT, f"{what}: expected a whole number of {8 * ctypes.sizeof(kind)} bits, found {value}")
    return value


def _ids(ids):
    ids = [_whole(f"token {i}", value) for i, value in enumerate(ids)]
    return (c_int32 * len(ids))(*ids), len(ids)


def _path(path):
    return os.fsencode(path)


def version():
    return _lib.ltn_version().decode()


class _Handle:
    """Owns one pointer of the library's."""
    _close = None

    def __init__(self):
        self._pointer = c_void_p()

    @property
    def _c(self):
        if not self._pointer:
            raise ValueError(f"this {type(self).__name__} is closed")
        return self._pointer

    def close(self):
        if self._pointer:
            getattr(_lib, self._close)(self._pointer)
            self._pointer = c_void_p()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if getattr(self, "_pointer", None):
            self.close()


class Engine(_Handle):
    """A model. device: "auto", "cpu", "cuda", "cuda:N"; n_threads of the CPU, 0: one per core; progress(done,
    total) is called with bytes while it loads; prefill: "exact", "fp8" (see ltn.h)."""
    _close = "ltn_engine_close"

    def __init__(self, path, device="auto", n_threads=0, progress=None, prefill="exact"):
        super().__init__()
        self._sessions = weakref.WeakSet()
        with _Guard() as guard:
            def tell(_, done, total):
                progress(done, total)
            report = PROGRESS_FN(guard.wrap(tell)) if progress else PROGRESS_FN()
            options = EngineOptions(device.encode(), _whole("n_threads", n_threads), report, None,
                                    prefill.encode())
            _call("ltn_engine_open", byref(self._pointer), _path(path), byref(options))

    def close(self):
        for session in list(self._sessions):  # engines outlive their sessions
            session.close()
        super().close()

    @property
    def info(self):
        """The fields of struct ltn_engine_info, by name."""
        info = _lib.ltn_engine_info(self._c).contents
        values = ((name, getattr(info, name)) for name, _ in EngineInfo._fields_)
        return {name: v.decode() if isinstance(v, bytes) else v for name, v in values}

    def tokenize(self, text):
        text = text.encode() if isinstance(text, str) else text
        ids, n = POINTER(c_int32)(), c_size_t()
        _call("ltn_engine_tokenize", self._c, text, len(text), byref(ids), byref(n))
        try:
            return ids[:n.value]
        finally:
            _free(ids)

    def detokenize(self, ids):
        text, n = POINTER(c_char)(), c_size_t()
        _call("ltn_engine_detokenize", self._c, *_ids(ids), byref(text), byref(n))
        try:
            return text[:n.value].decode()
        finally:
            _free(text)

    def session(self, chunk_rows=0, score_rows=0):
        return Session(self, chunk_rows, score_rows)

    def batch(self, max_sessions):
        return Batch(self, max_sessions)


class Batch(_Handle):
    """Steps several sessions of one engine together: their logits and samples then cost no more passes."""
    _close = "ltn_batch_free"

    def __init__(self, engine, max_sessions):
        super().__init__()
        _call("ltn_batch_create", byref(self._pointer), engine._c, _whole("max_sessions", max_sessions))
        engine._sessions.add(self)  # it, too, is closed before its engine

    def step(self, sessions, **sampling):
        """sampling: how the sessions will draw next, as for Session.sample, if that is known."""
        pointers = [session._c for session in sessions]
        _call("ltn_batch_step", self._c, (c_void_p * len(pointers))(*pointers), len(pointers),
              byref(_sampling(sampling)) if sampling else None)


class Session(_Handle):
    """One timeline through a model: at first at position 0, seed 0."""
    _close = "ltn_session_free"

    def __init__(self, engine, chunk_rows=0, score_rows=0):
        super().__init__()
        self.engine = engine
        self._options = (_whole("chunk_rows", chunk_rows), _whole("score_rows", score_rows))
        _call("ltn_session_create", byref(self._pointer), engine._c, byref(SessionOptions(*self._options)))
        engine._sessions.add(self)

    @property
    def position(self):
        return _lib.ltn_session_position(self._c)

    def reset(self):
        _call("ltn_session_reset", self._c)

    def fork(self):
        """Another session that stands where this one does."""
        other = Session(self.engine, *self._options)
        _call("ltn_session_copy", other._c, self._c)
        return other

    def feed(self, text):
        """Feeds a whole text, or token ids."""
        if isinstance(text, (str, bytes)):
            self.feed_text(text)
            self.end_text()
        else:
            _call("ltn_session_feed", self._c, *_ids(text))

    def feed_text(self, text):
        """Feeds a piece of a text, of any size; end_text says that it is complete."""
        text = text.encode() if isinstance(text, str) else text
        _call("ltn_session_feed_text", self._c, text, len(text))

    def end_text(self):
        _call("ltn_session_end_text", self._c)

    def logits(self):
        """Of the last token fed: an array.array of floats, which numpy.asarray takes."""
        logits = POINTER(c_float)()
        _call("ltn_session_logits", self._c, byref(logits))
        return self._row(logits, 1)

    def _row(self, logits, rows):
        bytes_ = 4 * rows * self.engine.info["vocab_size"]
        return array.array("f", ctypes.string_at(logits, bytes_))

    def score(self, ids, each):
        """Feeds ids; each(position, rows, logits) gets the logits of the tokens from position on, [rows *
        vocab_size] in an array. The session needs score_rows."""
        def work(_, logits, position, rows, err):
            each(position, rows, self._row(logits, rows))
            return OK
        with _Guard() as guard:
            _call("ltn_session_score", self._c, *_ids(ids), LOGITS_FN(guard.wrap(work)), None)

    def save(self, path):
        _call("ltn_session_save", self._c, _path(path))

    def load(self, path):
        _call("ltn_session_load", self._c, _path(path))

    def to_bytes(self):
        """The bytes that save writes."""
        buffer = ctypes.create_string_buffer(self.engine.info["session_bytes"])
        _call("ltn_session_export", self._c, buffer, len(buffer))
        return buffer.raw

    def from_bytes(self, data):
        _call("ltn_session_import", self._c, bytes(data), len(data))

    def seed(self, seed):
        _lib.ltn_session_seed(self._c, _whole("seed", seed, c_uint64))

    def skip(self, draws):
        """Leaves out so many draws: forks that leave out different multiples of FORK_DRAWS are independent."""
        _lib.ltn_session_skip(self._c, _whole("draws", draws, c_uint64))

    def sample(self, **sampling):
        """Draws the next token, which is not fed."""
        id_ = c_int32()
        _call("ltn_session_sample", self._c, byref(_sampling(sampling)), byref(id_))
        return id_.value

    def generate(self, max_tokens=-1, piece=None, stop=(), ignore_eos=False, keep_open=False, drawn=None, **sampling):
        """Continues the text: (text, struct ltn_generated). piece(id, text) is called with each token as struct
        ltn_generate_options says, and drawn(id, logits) before it is fed; raising ltn.Stop in piece ends the
        generation in good order, anything else comes out of here. sampling: fields of struct ltn_sampling by
        name; bias is a dict from ids to values."""
        parts, result = [], Generated()

        def take(_, id_, text, n, err):
            parts.append(text[:n].decode())
            try:
                if piece:
                    piece(id_, parts[-1])
            except Stop:
                return ERR_STOPPED
            return OK

        def draw(_, id_, logits, err):
            drawn(id_, self._row(logits, 1))
            return OK
        stop = [s.encode() for s in ([stop] if isinstance(stop, str) else stop)]
        with _Guard() as guard:
            options = GenerateOptions(
                ctypes.pointer(_sampling(sampling)), _whole("max_tokens", max_tokens, c_int64), ignore_eos, keep_open,
                (c_char_p * len(stop))(*stop), len(stop), PIECE_FN(guard.wrap(take)),
                DRAWN_FN(guard.wrap(draw)) if drawn else DRAWN_FN(), None)
            _call("ltn_generate", self._c, byref(options), byref(result))
        return "".join(parts), result

    def stream(self, max_tokens=-1, ignore_eos=False, **sampling):
        """The same as an iterator over the pieces of text. Between two of them the session is free: it may be
        asked, saved, forked, or left. Stop strings need generate, which looks ahead."""
        end = END_LENGTH
        while max_tokens != 0 and end == END_LENGTH:
            text, result = self.generate(1, ignore_eos=ignore_eos, keep_open=True, **sampling)
            max_tokens -= max_tokens > 0
            end = result.end
            if text:
                yield text
        text, _ = self.generate(0, **sampling)  # a character that never became whole
        if text:
            yield text


def _sampling(fields):
    """The library's defaults with these fields changed."""
    sampling = Sampling.from_buffer_copy(Sampling.in_dll(_lib, "ltn_sampling_default"))
    kinds = dict(Sampling._fields_)
    for name, value in fields.items():
        if name == "bias":
            pairs = [LogitBias(_whole("bias", id_), bias) for id_, bias in value.items()]
            sampling.bias, sampling.n_bias = (LogitBias * len(pairs))(*pairs), len(pairs)
        elif name in kinds and name != "n_bias":
            setattr(sampling, name, _whole(name, value) if kinds[name] is c_int32 else value)
        else:
            raise TypeError(f"sampling has no '{name}'")
    return sampling


class _Guard:
    """Carries an exception from a callback through C and out of the with block."""

    def __init__(self):
        self.raised = None

    def wrap(self, work):
        def callback(*arguments):
            try:
                return work(*arguments)
            except BaseException as raised:
                self.raised = raised
                return ERR_STOPPED
        return callback

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.raised:
            raise self.raised
