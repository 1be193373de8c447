"""Prints C that compiles only where bindings/ltn.py declares what src/ltn.h does: every struct by its size, every
field by name, order, type and offset, every number with a name, the arguments of every function. What one side lacks is
named on stderr, with exit status 1. Needs $LTN_LIB, like the binding.

    python3 tests/binding_layout.py src/ltn.h kernels/status.h | cc -fsyntax-only ... -x c -
"""
import ctypes
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "bindings"))
import ltn

UNBOUND = {"ltn_engine_tokenizer", "ltn_fail"}  # for C alone: the one gives a C object, the other is for C callbacks
SCALARS = {ctypes.c_int32: "int32_t", ctypes.c_int64: "int64_t", ctypes.c_uint64: "uint64_t",
           ctypes.c_double: "double", ctypes.c_float: "float", ctypes.c_bool: "bool", ctypes.c_char: "char",
           ctypes.c_char_p: "const char *", ctypes.c_void_p: "void *"}
FUNCTION_TYPES = {ltn.LOGITS_FN: "ltn_logits_fn *", ltn.DRAWN_FN: "ltn_drawn_fn *", ltn.PIECE_FN: "ltn_piece_fn *"}

header = "\n".join(open(path).read() for path in sys.argv[1:])
numbers = set(re.findall(r"^#define LTN_(\w+) ", header, flags=re.M))
header = re.sub(r"/\*.*?\*/|^ *#[^\n]*(\\\n[^\n]*)*", "", header, flags=re.S | re.M)
problems = []


def same(what, here, there):
    if here != there:
        problems.append(f"{what}: expected {there}, found {here}")


def c_type(type_):
    if type_ in FUNCTION_TYPES:
        return FUNCTION_TYPES[type_]
    if type_ is ctypes.POINTER(ctypes.c_void_p):
        return "void *"  # of an engine or a session
    if hasattr(type_, "contents"):
        return ("const " if type_._type_ is ctypes.c_float else "") + c_type(type_._type_) + " *"
    return SCALARS[type_] if type_ in SCALARS else f"struct {type_.c_name}"


def expect(condition, what):
    print(f'_Static_assert({condition}, "{what}");')


print("#include <ltn.h>")
structs = dict(re.findall(r"struct (ltn_\w+) \{(.*?)\};", header, flags=re.S))
same("structs", sorted(s.c_name for s in ltn.STRUCTS), sorted(structs))
for struct in ltn.STRUCTS:
    name = struct.c_name
    body = re.sub(r"\(\*(\w+)\)\([^)]*\)", r"\1", structs.get(name, ""))  # a function's arguments are no fields
    same(f"struct {name}", [field for field, _ in struct._fields_], re.findall(r"(\w+)(?:\[\w+\])?\s*[,;]", body))
    expect(f"sizeof(struct {name}) == {ctypes.sizeof(struct)}", f"size of {name}")
    for field, type_ in struct._fields_:
        value, where = f"((struct {name} *)0)->{field}", getattr(struct, field)
        expect(f"offsetof(struct {name}, {field}) == {where.offset}", f"offset of {name}.{field}")
        expect(f"sizeof({value}) == {where.size}", f"size of {name}.{field}")
        if type_ in SCALARS:  # an enum's type is unsigned here
            also = {ctypes.c_int: ", unsigned: 1", ctypes.c_void_p: ", struct ltn_batch *: 1"}.get(type_, "")
            expect(f"_Generic({value}, {c_type(type_)}: 1{also}, default: 0)", f"type of {name}.{field}")

for enumeration in re.findall(r"\benum(?: \w+)? \{(.*?)\}", header, flags=re.S):
    numbers.update(re.findall(r"\bLTN_(\w+)", enumeration))
for number in sorted(numbers):
    value = getattr(ltn, number, None)
    same(f"LTN_{number}", value is not None, True)
    expect(f"LTN_{number} == {value}", f"LTN_{number}")

declared = set(re.findall(r"\b(ltn_\w+)\(", header)) - set(re.findall(r"typedef[^;]*?\b(ltn_\w+)\(", header))
same("functions", sorted(ltn.FUNCTIONS), sorted(declared - UNBOUND))


def call(function, name, result, arguments):
    """A call with variables of our types: another number, or a narrower or unlike type, does not compile."""
    for i, argument in enumerate(arguments):
        print(f"    extern {c_type(argument)} {name}_{i};")
    values = ", ".join(f"{name}_{i}" for i in range(len(arguments)))
    if result is None:
        print(f"    {function}({values});")
    else:
        kind = "enum ltn_status" if result is ctypes.c_int else c_type(result)
        print(f"    const {kind.replace('const ', '')} {name}_result = {function}({values});\n    (void){name}_result;")


print("void calls(struct ltn_engine_options *options, ltn_logits_fn *logits,\n"
      "           ltn_drawn_fn *drawn, ltn_piece_fn *piece)\n{")
for function, (result, arguments) in ltn.FUNCTIONS.items():
    call(function, function, result, arguments)
for function, type_ in ("options->progress", "PROGRESS_FN"), ("logits", "LOGITS_FN"), ("drawn", "DRAWN_FN"), \
        ("piece", "PIECE_FN"):
    call(function, type_, getattr(ltn, type_)._restype_, getattr(ltn, type_)._argtypes_)
print("}")
for problem in problems:
    print(f"bindings/ltn.py: {problem}", file=sys.stderr)
sys.exit(bool(problems))
