"""The tables in documents that tools make: each stands between the lines <!-- NAME --> and <!-- end -->."""
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def result(name):
    return os.path.join(ROOT, "tools", "results", name)


def replace(path, text):
    with open(path + ".new", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".new", path)


def put(name, table, document="README.md"):
    path = os.path.join(ROOT, document)
    with open(path, encoding="utf-8") as f:
        text = f.read()
    begin, end = "<!-- %s -->\n" % name, "<!-- end -->"
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise SystemExit("%s: expected the lines %s and %s" % (document, begin.strip(), end))
    head, rest = text.split(begin, 1)
    replace(path, head + begin + table + "\n" + end + rest.split(end, 1)[1])
