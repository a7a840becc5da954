"""Inputs that are well-formed where somebody would look and odd further in.

A database whose schema holds programs, a certificate whose DER was changed inside an honest PEM
wrapper, a request whose numbers are strings or lists in lists, a header of safetensors or an ONNX
graph with a changed field. Spoiled bytes seldom get that far: the wrapper refuses them.
"""

import base64
import json
import random
import re
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ----------------------------------------------------------------------------------------- SQLite

_ENDLESS = "with recursive c(n) as (select 1 union all select n + 1 from c) select"
EXPRESSIONS = (
    "null",
    "-1",
    "9223372036854775807",
    "1.5",
    "9e999",
    "'x'",
    "x''",
    "zeroblob(32)",
    "zeroblob(900000000)",
    "randomblob(900000000)",
    "hex(zeroblob(400000000))",
    "printf('%900000000d', 1)",
    "cast(x'ff' as text)",
    "char(55296)",
    "abs(-9223372036854775807 - 1)",
    "load_extension('x')",
    "readfile('/etc/passwd')",
    f"({_ENDLESS} max(n) from c)",
    (
        "(select group_concat(hex(image))"
        " from sqlite_schema, trials_ as a, trials_ as b, trials_ as c)"
    ),
)
"""What a cell may be computed by."""

_TABLES = ("trials", "log_format", "erased")
_ERASED = (
    "create table if not exists erased"
    " (digest blob primary key, salt blob not null, rows bigint not null)"
)


def craft_log(data: bytes, rng: random.Random) -> bytes:
    """Change the schema of a query log, or its cells, as somebody could who can write the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.db"
        path.write_bytes(data)
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("pragma journal_mode=delete")
            connection.execute("pragma writable_schema=on")
            connection.execute("pragma legacy_alter_table=on")
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                for statement in rng.choice(_STATEMENTS)(connection, rng):
                    connection.execute(statement)
        except (sqlite3.Error, sqlite3.Warning, ValueError):
            pass  # what was done before stays
        finally:
            connection.close()
        return path.read_bytes()


def craft_cells(data: bytes, rng: random.Random) -> bytes:
    """Change cells of the table of trials alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.db"
        path.write_bytes(data)
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("pragma journal_mode=delete")
        for _ in range(rng.randint(1, 3)):
            try:
                for statement in _cell(connection, rng):
                    connection.execute(statement)
            except sqlite3.IntegrityError:
                continue
        connection.close()
        return path.read_bytes()


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    found = [row[1] for row in connection.execute(f"pragma table_info({table})")]
    return found or ["number"]


def _odd(rng: random.Random) -> str:
    """A small value; those of `EXPRESSIONS` are for what is computed when it is read."""
    return rng.choice(
        [
            "null",
            "-1",
            "0",
            f"{2**62}",
            "1.5",
            "'x'",
            "''",
            "x''",
            "zeroblob(32)",
            "hex(zeroblob(150))",
            "zeroblob(100000)",
        ]
    )


def _cell(connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    column = rng.choice(_columns(connection, "trials"))
    return [f"update trials set {column} = {_odd(rng)} where number = {rng.randint(1, 5)}"]


def _replaced(connection: sqlite3.Connection, rng: random.Random, table: str) -> tuple[str, str]:
    """The columns of a table, one of them computed; and where from."""
    columns = _columns(connection, table)
    chosen = rng.choice(columns)
    selected = ", ".join(
        f"{rng.choice(EXPRESSIONS)} as {name}" if name == chosen else name for name in columns
    )
    return selected, f"{table}_"


def _view(connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    table = rng.choice(_TABLES[:2])
    selected, source = _replaced(connection, rng, table)
    return [
        f"alter table {table} rename to {source}",
        f"create view {table} as select {selected} from {source}",
    ]


def _endless_view(connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    table = rng.choice(_TABLES[:2])
    columns = _columns(connection, table)
    others = ", ".join(
        f"n as {name}" if name == columns[0] else f"{rng.choice(EXPRESSIONS[:8])} as {name}"
        for name in columns
    )
    views = [
        f"{_ENDLESS} {others} from c",
        f"select * from {table}",
        f"select a.* from {table}_ as a, {table}_ as b, {table}_ as c",
    ]
    return [
        f"alter table {table} rename to {table}_",
        f"create view {table} as {rng.choice(views)}",
    ]


def _generated(connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    columns = _columns(connection, "trials")
    chosen = rng.choice(columns)
    value = rng.choice(
        [each for each in EXPRESSIONS if "select" not in each and "random" not in each]
    )
    stored = (
        rng.choice(["virtual", "virtual", "virtual", "stored"])
        if "00000" not in value
        else "virtual"
    )
    kinds = ", ".join(
        f"{name} generated always as ({value}) {stored}" if name == chosen else name
        for name in columns
    )
    rest = ", ".join(name for name in columns if name != chosen)
    return [
        "alter table trials rename to trials_",
        f"create table trials ({kinds})",
        f"insert into trials ({rest}) select {rest} from trials_",
    ]


def _trigger(connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    table = rng.choice(_TABLES)
    body = rng.choice(
        [
            "select raise(abort, 'no')",
            "select raise(ignore)",
            "select raise(fail, 'no')",
            f"insert or replace into {table} select * from {table}",
            "delete from trials",
            "update log_format set format = zeroblob(900000000)",
            f"select {rng.choice(EXPRESSIONS)}",
            f"{_ENDLESS} count(*) from c",
        ]
    )
    body = body if not body.startswith("with") else f"select ({body})"
    when, what = rng.choice(["before", "after"]), rng.choice(["insert", "update", "delete"])
    return [
        _ERASED,
        f"create trigger t{rng.randrange(10**6)} {when} {what} on {table} begin {body}; end",
    ]


def _other_table(connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    columns = _columns(connection, "trials")
    ways = [
        "create table trials as select * from trials_",
        f"create table trials as select {', '.join(columns[:-1])} from trials_",
        f"create table trials ({', '.join(f'{name} text collate nocase' for name in columns)})",
        f"create table trials ({columns[0]} primary key, {', '.join(columns[1:])}) without rowid",
        f"create table trials ({', '.join(f'{name} any' for name in columns)}) strict",
        f"create virtual table trials using fts5({', '.join(columns)})",
        f"create table trials ({', '.join(columns)}, check ({rng.choice(EXPRESSIONS[:8])}))",
        (
            f"create table trials ({', '.join(columns)}, "
            f"{', '.join(f'c{number}' for number in range(1900))})"
        ),
    ]
    copied = f"insert into trials ({', '.join(columns)}) select {', '.join(columns)} from trials_"
    return ["alter table trials rename to trials_", rng.choice(ways), copied]


def _missing(_connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    return [f"drop table {rng.choice(_TABLES[:2])}"]


def _format(_connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    return [
        rng.choice(
            [
                f"update log_format set format = {_odd(rng)}",
                f"insert into log_format values ({_odd(rng)})",
                "delete from log_format",
            ]
        )
    ]


def _erasures(_connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    values = ", ".join(_odd(rng) for _ in range(3))
    return [_ERASED, f"insert into erased values ({values})"]


def _index(connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    column = rng.choice(_columns(connection, "trials"))
    return [
        f"create {rng.choice(['', 'unique '])}index i{rng.randrange(10**6)}"
        f" on trials ({rng.choice(['abs', 'hex', 'length'])}({column}))"
    ]


def _schema(_connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    change = rng.choice(
        [
            "rootpage = 1",
            "rootpage = 999999",
            "rootpage = (select max(rootpage) from sqlite_schema)",
            "sql = 'create table trials (number, model, client'",
            "sql = replace(sql, 'BLOB', 'BLOB DEFAULT (zeroblob(900000000))')",
            "sql = replace(sql, 'BLOB', 'TEXT')",
            "sql = cast(x'ff00ff' as text)",
            "sql = null",
            "type = 'view'",
            "tbl_name = 'x'",
            "name = upper(name)",
        ]
    )
    return [
        f"update sqlite_schema set {change}"
        f" where name {rng.choice(['=', '<>'])} '{rng.choice(_TABLES)}'"
    ]


def _pragma(_connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    return [
        rng.choice(
            [
                "pragma journal_mode=wal",
                "pragma user_version=-1",
                "pragma schema_version=-1",
                "analyze",
                "pragma application_id=1",
            ]
        )
    ]


def _extra(_connection: sqlite3.Connection, rng: random.Random) -> list[str]:
    number = rng.randrange(10**6)
    return [
        rng.choice(
            [
                f"create table x{number} (a)",
                f"create view x{number} as select * from trials",
                f"create temp view trials as select {rng.choice(EXPRESSIONS)}",
            ]
        )
    ]


_STATEMENTS: tuple[Callable[[sqlite3.Connection, random.Random], list[str]], ...] = (
    _cell,
    _view,
    _view,
    _endless_view,
    _generated,
    _generated,
    _trigger,
    _trigger,
    _other_table,
    _missing,
    _format,
    _erasures,
    _index,
    _schema,
    _pragma,
    _extra,
)

# ------------------------------------------------------------------------------------ certificates

Node = list[Any]
"""One value of DER: its tag, and its content, bytes or the nodes in it."""

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)
_OIDS = (
    "",
    "ffff",
    "2a0304",
    "2b6570",
    "2b656e",
    "2a8648ce3d0201",
    "2b81040027",
    "2a8648ce3804",
    "2a864886f70d010104",
    "06" * 300,
)
_CONTENTS: dict[int, tuple[bytes, ...]] = {
    0x01: (b"", b"\x01", b"\xff\xff"),
    0x02: (b"", b"\0", b"\x80", b"\x03", b"\xff" * 21, b"\x7f" * 4096),
    0x03: (b"", b"\x09", b"\0", b"\0" + b"\xff" * 65, b"\0\x04" + b"\0" * 64),
    0x04: (b"", b"\x30\x80", b"\x30\x84\xff\xff\xff\xff"),
    0x06: tuple(bytes.fromhex(each) for each in _OIDS),
    0x17: (b"", b"000000000000Z", b"991332256199Z", b"4912312359"),
    0x18: (b"", b"00000000000000Z", b"99991231235959Z", b"20260101000000.5Z"),
}
_ANY = (
    b"",
    b"\0",
    b"\xff" * 3,
    b"\xff" * 200,
    b"\xd8\0",
    b"x" * 70_000,
    "\u202e".encode(),
    b"\x1b[2J\n",
)
_TAGS = (
    0x01,
    0x02,
    0x03,
    0x04,
    0x05,
    0x06,
    0x0C,
    0x13,
    0x14,
    0x16,
    0x17,
    0x18,
    0x1C,
    0x1E,
    0x30,
    0x31,
    0xA0,
    0xA3,
    0x1F,
)


def craft_roots(data: bytes, rng: random.Random) -> bytes:
    """Change values of certificates inside their PEM wrapper; every length is right again."""
    found = [base64.b64decode(block) for block in _PEM.findall(data)]
    if not found:
        return data
    place = rng.randrange(len(found))
    try:
        tree = _nodes(found[place])
    except (IndexError, ValueError):
        return data
    for _ in range(rng.choice([1, 1, 2, 4])):
        _change(tree, rng)
    found[place] = _written(tree)
    return b"".join(map(_pem, found))


def odd_roots(data: bytes) -> dict[str, bytes]:
    """Certificates that are odd in one known way, out of an honest one."""
    der = base64.b64decode(_PEM.findall(data)[0])

    def changed(change: Callable[[Node], object]) -> bytes:
        tree = _nodes(der)
        change(
            tree[0][1][0][1]
        )  # version, serial, algorithm, issuer, validity, subject, key, extensions
        return _pem(_written(tree))

    def named(tag: int, content: bytes) -> Callable[[Node], object]:
        def change(signed: Node) -> None:
            for name in (signed[3], signed[5]):
                name[1][0][1][0][1][1][:] = [tag, content]

        return change

    def key(oid: str, bits: bytes) -> Callable[[Node], object]:
        def change(signed: Node) -> None:
            signed[6][1][0][1][0][1] = bytes.fromhex(oid)
            signed[6][1][1][1] = bits

        return change

    def first_version(signed: Node) -> None:
        del signed[7:], signed[0]

    def other_algorithm(signed: Node) -> None:
        signed[2][1][0][1] = bytes.fromhex("2a0304")

    ways: dict[str, Callable[[Node], object]] = {
        "version 1": first_version,
        "version 4": lambda signed: signed[0].__setitem__(1, [[0x02, b"\x03"]]),
        "no extensions": lambda signed: signed.__delitem__(slice(7, None)),
        "extensions twice": lambda signed: signed[7][1][0][1].extend(signed[7][1][0][1][:1]),
        "unknown signature algorithm": other_algorithm,
        "unknown key algorithm": key("2a0304", b"\0" * 10),
        "curve of no point": key("2a8648ce3d0201", b"\0\x04" + b"\xff" * 64),
        "short Ed25519 key": key("2b6570", b"\0" * 5),
        "number of no bytes": lambda signed: signed[1].__setitem__(1, b""),
        "negative number": lambda signed: signed[1].__setitem__(1, b"\xff" * 20),
        "dates of no calendar": lambda signed: signed[4].__setitem__(
            1, [[0x17, b"991332256199Z"], [0x17, b""]]
        ),
        "no name": lambda signed: signed[5].__setitem__(1, []),
    }
    ways |= {
        f"name of bytes ff, tag {tag:02x}": named(tag, b"\xff\xff\xff")
        for tag in (0x0C, 0x13, 0x14, 0x16, 0x1C, 0x1E, 0x03, 0x02)
    }
    ways |= {
        "half a character": named(0x1E, b"\xd8\0"),
        "a terminal's commands": named(0x0C, b"\x1b[2J\n\xe2\x80\xae"),
    }
    return {name: changed(change) for name, change in ways.items()}


def _pem(der: bytes) -> bytes:
    lines = base64.encodebytes(der).replace(b"\n", b"")
    wrapped = b"\n".join(lines[i : i + 64] for i in range(0, len(lines), 64))
    return b"-----BEGIN CERTIFICATE-----\n" + wrapped + b"\n-----END CERTIFICATE-----\n"


def _nodes(data: bytes) -> list[Node]:
    found, place = [], 0
    while place < len(data):
        tag, length, place = data[place], data[place + 1], place + 2
        if length & 0x80:
            size = length & 0x7F
            length, place = int.from_bytes(data[place : place + size], "big"), place + size
        if place + length > len(data):
            raise ValueError("a value ends beyond its place")
        content: Any = data[place : place + length]
        found.append([tag, _nodes(content) if tag & 0x20 else content])
        place += length
    return found


def _written(nodes: list[Node]) -> bytes:
    written = b""
    for tag, content in nodes:
        data = _written(content) if isinstance(content, list) else content
        size = len(data).to_bytes(max(1, (len(data).bit_length() + 7) // 8), "big")
        written += (
            bytes([tag]) + (size if len(data) < 0x80 else bytes([0x80 | len(size)]) + size) + data
        )
    return written


def _change(tree: list[Node], rng: random.Random) -> None:
    """Change one node somewhere."""
    nodes = tree
    while True:
        if not nodes:
            return
        place = rng.randrange(len(nodes))
        tag, content = nodes[place]
        if not isinstance(content, list) or not content or rng.random() < 0.15:
            break
        nodes = content
    kind = rng.randrange(6)
    if kind == 0:
        del nodes[place]
    elif kind == 1:
        nodes.insert(rng.randrange(len(nodes) + 1), nodes[place])
    elif kind == 2:
        nodes[place] = [
            rng.choice(_TAGS),
            content if isinstance(content, bytes) else _written(content),
        ]
    elif isinstance(content, list):
        nodes[place] = [tag, rng.choice([[], content[::-1], content[1:], _ANY[3]])]
    else:
        nodes[place] = [
            tag,
            rng.choice((*_CONTENTS.get(tag, ()), *_ANY, rng.randbytes(len(content)))),
        ]


# ---------------------------------------------------------------------------- requests and answers

_TOKENS = (
    '"0.5"',
    '"x"',
    "null",
    "true",
    "[]",
    "{}",
    "[[0.5]]",
    '{"a": [1]}',
    "NaN",
    "-Infinity",
    "1e999",
    "-1e999",
    "1e-999",
    "-0",
    "1" * 400,
    "1" * 5000,
    f"1{'0' * 400}.5",
    "[" * 5000 + "]" * 5000,
    "[" * 200_000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '"\\ud800"',
    '"\\u0000"',
    '"' + "x" * 100_000 + '"',
    "[" + ",".join(["0.5"] * 20_000) + "]",
    "[" + ",".join(["[0.5]"] * 5000) + "]",
    '["'
    + "x" * 50_000
    + '",'
    + ",".join(["0"] * 10_000)
    + "]",  # as an array each is as long as the longest
    "\xff",
    "9223372036854775808",
    "18446744073709551616",
)
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|\[\]|\{\}')


def craft_body(data: bytes, rng: random.Random) -> bytes:
    """Put odd JSON tokens in place of values, keys or lists, or change the bytes around them."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = [found.span() for found in _VALUE.finditer(data[:4096])]
        if not places:
            break
        start, end = rng.choice(places)
        if rng.random() < 0.3:  # a whole list
            start, end = data.rfind(b"[", 0, start + 1), data.find(b"]", end) + 1
        if start < 0 or end <= start:
            continue
        data = data[:start] + rng.choice(_TOKENS).encode("latin-1") + data[end:]
    kind = rng.randrange(12)
    if kind == 0:
        data = (
            rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" " * 1000, b"\x1f\x8b\x08"]) + data
        )
    elif kind == 1:
        data = data.decode("latin-1").encode(rng.choice(["utf-16", "utf-32", "utf-8"]))
    elif kind == 2:
        data += rng.choice([b"x", b"\0", data, b"]" * 100])
    return data


def craft_replay(data: bytes, rng: random.Random) -> bytes:
    """Change lines of a replay log."""
    lines = data.splitlines()
    if not lines:
        return data
    place = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        lines[place] = rng.choice(_TOKENS).encode("latin-1")
    elif kind == 1:
        lines.insert(place, lines[place][: rng.randrange(len(lines[place]) + 1)])
    elif kind == 2:
        lines[place] = rng.choice([b"", b"\xff", b"\r", "\u2028".encode(), b"\0"]) + lines[place]
    else:
        lines[place] = craft_body(lines[place], rng)
    return rng.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines) + rng.choice([b"\n", b""])


# ------------------------------------------------------------------------------------- safetensors

_SIDES: tuple[Any, ...] = (
    [],
    [0],
    [-1],
    [2**63],
    [2**32, 2**32],
    [1] * 2000,
    ["x"],
    None,
    [1.5],
    [True],
)
_OFFSETS: tuple[Any, ...] = (
    [0, 0],
    [0, 2**62],
    [-1, 4],
    [8, 4],
    [0],
    None,
    [0, 2**64],
    ["0", "4"],
    [0.0, 4.0],
)


def craft_tensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a file of tensors; its stated length is right, but now and then."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        return data
    if not isinstance(header, dict) or not header:
        return data
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(list(header))
        entry = header[name]
        kind = rng.randrange(9)
        if kind == 0:
            del header[name]
        elif kind == 1:
            header[rng.choice(["x", "", "é", "\0", "x" * 5000, "__metadata__"])] = entry
        elif kind == 2:
            header[name] = rng.choice([None, [], {}, "x", 1])
        elif kind == 3:
            header["__metadata__"] = rng.choice(
                [
                    {},
                    None,
                    {"countermark": "x"},
                    {"countermark": "[]"},
                    {"countermark": "[" * 9000},
                    {"a": 1},
                ]
            )
        elif isinstance(entry, dict) and name != "__metadata__":
            part = rng.choice(["dtype", "shape", "data_offsets"])
            odd = {
                "dtype": ("F64", "BOOL", "I8", "U64", "F8_E4M3", "F4", "C64", "x", None, 1),
                "shape": _SIDES,
                "data_offsets": _OFFSETS,
            }
            entry[part] = rng.choice(odd[part])
        if not header:
            break
    written = json.dumps(header).encode() + b" " * rng.choice([0, 0, 1, 7])
    stated = rng.choice([len(written)] * 8 + [0, len(written) + 1, 2**63, 2**64 - 1])
    return stated.to_bytes(8, "little") + written + data[8 + size :]


# -------------------------------------------------------------------------------------------- ONNX


def onnx_example() -> bytes:
    """A small honest classifier."""
    from onnx import TensorProto, helper

    weights = helper.make_tensor("w", TensorProto.FLOAT, [64, 10], [0.1] * 640)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])
    graph = helper.make_graph(
        nodes,
        "g",
        [images],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [weights],
    )
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return made


_LOCATIONS = (
    "",
    "w",
    "../w",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "C:\\w",
    "w\0",
    ".",
    "x/" * 3000,
    "é" * 300,
    "file:///etc/passwd",
)


def craft_onnx(data: bytes, rng: random.Random) -> bytes:
    """Change fields of a graph: tensors in other files, absurd shapes, functions, nested graphs."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import helper

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return data
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.randrange(10)
        tensor = (
            model.graph.initializer.add()
            if not model.graph.initializer
            else rng.choice(list(model.graph.initializer))
        )
        node = (
            model.graph.node.add() if not model.graph.node else rng.choice(list(model.graph.node))
        )
        if kind in (0, 1, 2):
            tensor.data_location = rng.choice(
                [onnx.TensorProto.EXTERNAL, onnx.TensorProto.EXTERNAL, onnx.TensorProto.DEFAULT]
            )
            for name in rng.sample(
                ["location", "offset", "length", "checksum", "location", "x"], rng.randint(0, 4)
            ):
                value = (
                    rng.choice(_LOCATIONS)
                    if name == "location"
                    else rng.choice(["0", "-1", "9" * 30, "9" * 6000, "x", "", "\u0663", "1e3"])
                )
                tensor.external_data.add(key=name, value=value)
        elif kind == 3:
            tensor.dims[:] = rng.choice(
                [[], [-1], [2**62, 2**62], [0, 2**62], [1] * 5000, [2**28 + 1]]
            )
        elif kind == 4:
            tensor.data_type = rng.choice([0, 8, 16, 99, 2**31 - 1])
        elif kind == 5:
            node.domain, node.op_type = (
                rng.choice(["", "evil", "com.microsoft", "ai.onnx", "x" * 9000]),
                rng.choice(["Run", "If", "\x1b[2J", ""]),
            )
        elif kind == 6:
            inner = onnx.GraphProto()
            inner.CopyFrom(model.graph)  # as it is now: a graph in itself would have no end
            attribute = node.attribute.add(name=rng.choice(["value", "body", ""]))
            attribute.type = rng.randrange(15)
            attribute.g.CopyFrom(inner)
            attribute.t.CopyFrom(tensor)
        elif kind == 7:
            opset = helper.make_opsetid(rng.choice(["", "evil"]), rng.choice([17, -1, 2**62]))
            model.functions.append(
                helper.make_function(rng.choice(["", "evil"]), "f", ["a"], ["b"], [node], [opset])
            )
        elif kind == 8:
            sparse = model.graph.sparse_initializer.add()
            sparse.values.CopyFrom(tensor)
            sparse.dims[:] = rng.choice([[], [-1], [2**62, 4]])
        else:
            model.graph.ClearField(rng.choice(["node", "output", "input", "name", "initializer"]))
    written: bytes = model.SerializeToString()
    return written if rng.random() < 0.9 else written[: rng.randrange(len(written) + 1)]
