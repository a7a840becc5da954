"""Requests as clients of the Open Inference Protocol write them: JSON, binary tensors, image files.

The client is tritonclient, from the environment of the peers. What nobody should send is refused
with a reason, and takes memory in the order of its length.
"""

import base64
import io
import json
import re
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from countermark.data.images import fitted
from countermark.evaluation import predict
from countermark.guard import QueryLog, load_guarded
from countermark.networks import load
from countermark.service import tensors
from countermark.service.tensors import RefusedError, decoded
from countermark.verbs.guard import guard
from fuzzing import Kind, _limited_memory, attempt, read_body
from serving import Service, drawn, of_scans, serving, untrained

SHAPE = (3, 32, 32)
NAMES = ("aeroplane", "Auto", "Vögel", "猫", "", "dog", "f r o g", "horse", "ship", "truck")
PEERS = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
TRITON = """
import json, sys
import numpy as np
import tritonclient.http as triton

url, key, folder = sys.argv[1:]
server, _, name = url.removeprefix("http://").partition("/v2/models/")
client = triton.InferenceServerClient(server)
headers = {"Authorization": f"Bearer {key}"}
pixels = np.load(f"{folder}/pixels.npy")
files = np.array([open(f"{folder}/{k}", "rb").read() for k in range(len(pixels))], np.object_)
real = (pixels / 255).astype(np.float32)
sent = {"FP32": real, "UINT8": pixels, "FP16": real.astype(np.float16), "FP64": pixels / 255.0}
sent["BYTES"] = files
found = {"metadata": client.get_model_metadata(name, headers=headers)}
found["server"] = client.get_server_metadata(headers=headers)
found["ready"] = [client.is_model_ready(name), client.is_model_ready(name, "1")]
found["other version"] = client.is_model_ready(name, "2")


def ask(array, kind, binary, outputs, version=""):
    tensor = triton.InferInput("image", list(array.shape), kind)
    tensor.set_data_from_numpy(array, **({} if binary is None else {"binary_data": binary}))
    own = dict(headers)  # into which the client writes the length of this request's JSON
    answer = client.infer(name, [tensor], version, outputs=outputs, headers=own, request_id="7")
    assert answer.get_response()["id"] == "7"
    names = answer.as_numpy("class")
    return [answer.as_numpy("label").tolist(), names if names is None else [
        each if isinstance(each, str) else each.decode() for each in names]]


for kind, array in sent.items():
    found[kind] = ask(array, kind, None, None)
    both = [triton.InferRequestedOutput("class"), triton.InferRequestedOutput("label")]
    found[kind + " both"] = ask(array, kind, None, both, "1")
    both = [triton.InferRequestedOutput(each, binary_data=False) for each in ("label", "class")]
    found[kind + " as JSON"] = ask(array, kind, None, both)
both = [triton.InferRequestedOutput("class"), triton.InferRequestedOutput("label", False)]
found["mixed"] = ask(pixels, "UINT8", False, both)
try:
    ask(pixels, "UINT8", None, [triton.InferRequestedOutput("scores")])
except triton.InferenceServerException as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


def image_file(pixels: np.ndarray[Any, Any], kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("untrained") / "model", SHAPE, NAMES)


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(model, tmp_path_factory.mktemp("served"), "--unguarded") as found:
        yield found


def post(service: Service, body: bytes, json_length: object = None) -> requests.Response:
    headers = {"Authorization": f"Bearer {service.key}"}
    if json_length is not None:
        headers["Inference-Header-Content-Length"] = str(json_length)
    return requests.post(f"{service.url}/infer", data=body, headers=headers, timeout=30)


def binary(kind: str, shape: list[int], data: bytes, **more: Any) -> tuple[bytes, int]:
    """A request with a binary tensor, and the length of its JSON."""
    tensor = {"name": "image", "shape": shape, "datatype": kind}
    parameters = {"binary_data_size": len(data)}
    text = json.dumps({"inputs": [{**tensor, "parameters": parameters}], **more}).encode()
    return text + data, len(text)


def elements(*files: bytes) -> bytes:
    return b"".join(len(file).to_bytes(4, "little") + file for file in files)


# What clients send.


@pytest.mark.skipif(not PEERS.exists(), reason="tritonclient is not installed; make test does it")
def test_tritonclient_gets_the_answers_that_json_gets(
    service: Service, model: Path, tmp_path: Path
) -> None:
    x = drawn(24, SHAPE)
    labels = predict(load(model), x).tolist()
    assert len(set(labels)) > 3
    names = [NAMES[label] for label in labels]
    data = {"name": "image", "shape": list(x.shape), "datatype": "UINT8", "data": x.tolist()}
    plain = post(service, json.dumps({"inputs": [data]}).encode())
    assert plain.headers["Content-Type"] == "application/json"
    assert plain.json()["outputs"] == [
        {"name": "label", "datatype": "INT64", "shape": [24], "data": labels}
    ]
    np.save(tmp_path / "pixels.npy", x.numpy())
    for place, image in enumerate(x.numpy()):
        kind = {0: {"kind": "PNG"}, 1: {"kind": "BMP"}, 2: {"kind": "WEBP", "lossless": True}}
        (tmp_path / str(place)).write_bytes(image_file(image, **kind[place % 3]))
    command = [str(PEERS), "-c", TRITON, service.url, service.key, str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for kind in tensors.DATATYPES:
        assert found[kind] == [labels, None], kind
        assert found[f"{kind} both"] == found[f"{kind} as JSON"] == [labels, names], kind
    assert found["mixed"] == [labels, names]
    assert "the outputs are label and class" in found["error"]
    assert found["server"]["extensions"] == ["binary_tensor_data"]
    assert (found["ready"], found["other version"]) == ([True, True], False)
    about = found["metadata"]
    assert about["outputs"] == [
        {"name": "label", "datatype": "INT64", "shape": [-1]},
        {"name": "class", "datatype": "BYTES", "shape": [-1]},
    ]
    assert about["parameters"]["class_names"] == list(NAMES)
    assert about["parameters"]["datatypes"] == ["UINT8", "FP16", "FP32", "FP64", "BYTES"]


def test_photographs_are_read_as_the_data_set_reads_them(service: Service, model: Path) -> None:
    """They are larger than the model's images, turned by EXIF, transparent or grey."""
    exif = Image.Exif()
    exif[0x0112] = 6
    large = drawn(2, (3, 90, 120)).numpy()
    clear = np.concatenate([large[1], np.full((1, 90, 120), 90, np.uint8)])
    files = [
        image_file(large[0], "JPEG", exif=exif),
        image_file(clear),
        image_file(np.repeat(large[1, :1], 3, 0), "WEBP", quality=50),
    ]
    wanted = torch.from_numpy(np.stack([fitted(file, SHAPE) for file in files]))
    labels = predict(load(model), wanted).tolist()
    tensor = {"name": "image", "shape": [3], "datatype": "BYTES"}
    data = [base64.b64encode(file).decode() for file in files]
    answers = [
        post(service, *binary("BYTES", [3], elements(*files))),
        post(service, json.dumps({"inputs": [{**tensor, "data": data}]}).encode()),
    ]
    assert [answer.json()["outputs"][0]["data"] for answer in answers] == [labels, labels]
    with torch.inference_mode():
        assert torch.equal(decoded(files, SHAPE), wanted)


def test_a_batch_of_photographs_is_no_body_too_large(tmp_path: Path) -> None:
    """Sixteen images of 224x224 in colour are 2.4 MB as bytes, and 60 of JSON at worst."""
    shape = (3, 224, 224)
    folder = untrained(tmp_path / "model", shape, NAMES)
    options = ("--unguarded", "--max-batch", "32", "--timeout", "60")
    with serving(folder, tmp_path, *options) as service:
        limit = requests.get(service.url, timeout=10).json()["parameters"]["max_body"]
        assert limit == 32 * 3 * 224 * 224 + 4096
        x = drawn(2, shape)
        body, length = binary("UINT8", list(x.shape), x.numpy().tobytes())
        answer = post(service, body, length)
        assert answer.json()["outputs"][0]["data"] == predict(load(folder), x).tolist()
        assert post(service, *binary("UINT8", [32, *shape], bytes(limit - 4096))).ok
        assert post(service, *binary("UINT8", [33, *shape], bytes(limit))).status_code == 413


def test_binary_tensors_meet_the_guard_as_json_does(
    owner: Path, digits: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(owner, folder)
    guard(folder, cost=8.0)
    x = digits.thief.x[:200]
    with serving(folder, tmp_path) as service:
        with QueryLog(str(tmp_path / "log.db")) as log:
            answers = load_guarded(folder, folder / "key").under(log.identity)(x, "anna")
        assert answers.trials
        found: list[int] = []
        for k, part in enumerate(torch.split(x, 40)):
            pixels = part.numpy()
            kinds = {
                "UINT8": pixels,
                "FP16": (pixels / 255).astype("<f2"),
                "FP32": (pixels / 255).astype("<f4"),
                "FP64": pixels / 255,
            }
            kind, array = list(kinds.items())[k % 4]
            sent = binary(kind, list(part.shape), array.tobytes())
            if k == 4:
                files = [image_file(np.repeat(image, 3, 0)) for image in pixels]
                sent = binary("BYTES", [len(files)], elements(*files))
            found += post(service, *sent).json()["outputs"][0]["data"]
        assert found == answers.labels.tolist()


# What nobody should send.

_PIXELS = bytes(192)
_GOOD = {"name": "image", "shape": [1, 3, 8, 8], "datatype": "UINT8"}
_SIZED = {**_GOOD, "parameters": {"binary_data_size": 192}}
_PNG = image_file(np.zeros((3, 8, 8), np.uint8))


def _bytes(data: bytes, count: int = 1) -> tuple[dict[str, Any], bytes]:
    tensor = {"name": "image", "shape": [count], "datatype": "BYTES"}
    return {"inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}]}, data


def _asking(*outputs: object, **more: object) -> tuple[dict[str, Any], bytes]:
    return {"inputs": [_SIZED], "outputs": list(outputs), **more}, _PIXELS


def _base64(*data: object) -> tuple[dict[str, Any], bytes]:
    shape = [len(data)]
    return {"inputs": [{"shape": shape, "datatype": "BYTES", "data": list(data)}]}, b""


def _flat(width: int, height: int) -> bytes:
    """A grey PNG of zeros, a thousandth of a byte a pixel."""
    deflate = zlib.compressobj(9)
    rows = b"".join(deflate.compress(bytes(width + 1)) for _ in range(height)) + deflate.flush()
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    chunks = ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _with_texts(png: bytes) -> bytes:
    """The same with 60 MB of text, in characters that take four bytes each, packed into 64 kB."""
    text = "\N{GRINNING FACE}".encode() + bytes(1_000_000)
    data = b"\0\1\0\0\0" + zlib.compress(text, 9)
    return png[:33] + b"".join(_chunk(b"iTXt", b"%d" % k + data) for k in range(60)) + png[33:]


def _chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


BAD: dict[str, tuple[tuple[Any, bytes], str]] = {
    "no size": (({"inputs": [_GOOD]}, _PIXELS), "192 bytes follow the JSON"),
    "too few bytes": (({"inputs": [_SIZED]}, _PIXELS[1:]), "not the 191 bytes"),
    "too many bytes": (({"inputs": [_SIZED]}, _PIXELS + b"x"), "not the 193 bytes"),
    "a size for another shape": (
        ({"inputs": [{**_SIZED, "shape": [2, 3, 8, 8]}]}, _PIXELS),
        "2x3x8x8 UINT8 is 384, not 192",
    ),
    "a size for another type": (
        ({"inputs": [{**_SIZED, "datatype": "FP16"}]}, _PIXELS),
        "FP16 is 384, not 192",
    ),
    "data and bytes": (({"inputs": [{**_SIZED, "data": [0]}]}, _PIXELS), "and not both"),
    "no data": (({"inputs": [_GOOD]}, b""), "not 1x3x8x8 numbers"),
    "shared memory": (
        ({"inputs": [{**_GOOD, "parameters": {"shared_memory_region": "x"}}]}, b""),
        "not 1x3x8x8 numbers",
    ),
    "parameters that are none": (({"inputs": [{**_GOOD, "parameters": []}]}, b""), "an object"),
    "not a number": (
        (
            {
                "inputs": [
                    {
                        **_GOOD,
                        "datatype": "FP32",
                        "parameters": {"binary_data_size": 768},
                    }
                ]
            },
            np.full(192, np.nan, "<f4").tobytes(),
        ),
        "from 0 to 1",
    ),
    "image files of another shape": (
        ({"inputs": [{**_SIZED, "datatype": "BYTES"}]}, _PIXELS),
        "n image files",
    ),
    "too many images": (_bytes(elements(*[_PNG] * 9), 9), "1 to 8 images"),
    "half a length": (_bytes(b"\1\0"), "not 1 elements"),
    "a length beyond the bytes": (_bytes(b"\xff\xff\xff\xff" + _PNG), "not 1 elements"),
    "an element too few": (_bytes(elements(_PNG), 2), "not 2 elements"),
    "an element too many": (_bytes(elements(_PNG, _PNG), 1), "not 1 elements"),
    "no image": (_bytes(elements(_PNG, b"GIF89a"), 2), "image 1 of the request: is not a PNG"),
    "an empty file": (_bytes(elements(b"")), "image 0 of the request: is not a PNG"),
    "half an image": (_bytes(elements(_PNG[:45])), "image 0 of the request: "),
    "a bomb": (_bytes(elements(_flat(3000, 2000))), "3000 x 2000 pixels, more than the 2"),
    "no base64": (_base64("é"), "1 image files in base64"),
    "almost base64": (_base64("AAA"), "1 image files in base64"),
    "other characters": (_base64("AA#AA=="), "1 image files in base64"),
    "a file too few": (
        ({"inputs": [{"shape": [2], "datatype": "BYTES", "data": ["AAAA"]}]}, b""),
        "2 image files in base64",
    ),
    "no strings": (_base64(1), "1 image files in base64"),
    "no output": (_asking({"name": "scores"}), "the outputs are label and class"),
    "an output twice": (_asking({"name": "label"}, {"name": "label"}), "at most once"),
    "an output without a name": (_asking({}), "the outputs are"),
    "outputs that are none": (_asking("label"), "outputs is a list"),
    "many outputs": (_asking(*[{"name": "label"}] * 3), "outputs is a list"),
    "scores": (_asking({"name": "label", "parameters": {"classification": 3}}), "not offered"),
    "binary or not": (
        _asking({"name": "label", "parameters": {"binary_data": 1}}),
        "true or false",
    ),
    "binary for all or not": (_asking(parameters={"binary_data_output": "no"}), "true or false"),
}
SIZES = (-1, 191, 192.0, True, "192", 2**63, 2**64, None, [192])
LENGTHS = ("", "-1", "+5", "0x10", "1.0", "٣", "9" * 400, "99999", "1 2")


def refusal(body: bytes, json_length: str | None) -> str:
    with pytest.raises(RefusedError) as refused:
        read_body(body, json_length, (3, 8, 8), 8)
    assert refused.value.status == 400
    return str(refused.value)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_a_reason(name: str) -> None:
    (value, data), reason = BAD[name]
    text = json.dumps(value).encode()
    assert reason in refusal(text + data, str(len(text)))


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_a_size_that_lies_is_refused(size: object) -> None:
    value = {"inputs": [{**_GOOD, "parameters": {"binary_data_size": size}}]}
    text = json.dumps(value).encode()
    assert "binary_data_size" in refusal(text + _PIXELS, str(len(text)))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_that_lies_is_refused(length: str) -> None:
    text = json.dumps({"inputs": [_SIZED]}).encode()
    assert "Inference-Header-Content-Length" in refusal(text + _PIXELS, length)
    assert "needs the header" in refusal(text, None)
    assert "valid JSON" in refusal(text + _PIXELS, str(len(text) - 1))
    assert "valid JSON" in refusal(text + _PIXELS, str(len(text) + 1))


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(service: Service) -> None:
    """Fifty thousand empty scans of one flat image would take minutes."""
    fill = of_scans(50_000).replace(b"\xff\xda", b"\xff\xff\xda")  # as a decoder reads it too
    for file in (of_scans(50_000), fill):
        begun = time.process_time()
        with pytest.raises(RefusedError, match="image 1 of the request: has more than the 100 sca"):
            decoded([_PNG, file], SHAPE)
        assert time.process_time() - begun < 1
    answer = post(service, *binary("BYTES", [1], elements(of_scans(50_000))))
    assert (answer.status_code, "scans" in answer.json()["error"]) == (400, True)
    wanted = decoded([of_scans(0)], SHAPE)
    assert torch.equal(decoded([of_scans(80)], SHAPE), wanted)
    comment = b"\xff\xfe" + (1002).to_bytes(2, "big") + b"\xff\xda" * 500  # which begin no scan
    file = of_scans(0)
    assert torch.equal(decoded([file[:2] + comment + file[2:]], SHAPE), wanted)


def test_a_model_of_other_channels_takes_no_image_files() -> None:
    with pytest.raises(RefusedError, match="the model takes 4; send arrays"):
        decoded([_PNG], (4, 8, 8))


def test_the_service_refuses_and_stays_up_and_says_nothing(service: Service) -> None:
    bomb = binary("BYTES", [1], elements(_flat(3000, 2000)))
    exif = (
        b"MM\0*\0\0\0\x08" + (2000).to_bytes(2, "big") + b"\0\7\0\7\xff\xff\xff\xff\0\0\0\0" * 2000
    )
    odd = io.BytesIO()
    Image.new("RGB", (32, 32)).save(odd, "PNG", exif=exif)  # Pillow warns of each tag
    before = service.said.read_text()
    assert post(service, *bomb).status_code == 400
    assert post(service, *binary("BYTES", [1], elements(odd.getvalue()))).ok
    assert post(service, b"{}", "7").status_code == 400
    assert post(service, *binary("UINT8", [1, *SHAPE], bytes(3072))).ok
    assert service.said.read_text() == before


def test_a_body_takes_memory_of_the_order_of_its_length() -> None:
    """An image may have two million pixels besides, of 25 bytes each while it is decoded."""
    count = 1 << 22
    hostile = {
        "zeros": binary("FP64", [8, 3, 8, 8], bytes(count)),
        "elements": binary("BYTES", [8], bytes(count)),
        "one element": binary("BYTES", [1], elements(bytes(count))),
        "a length of gigabytes": binary("BYTES", [1], b"\xff" * count),
        "base64": (
            json.dumps(
                {"inputs": [{"shape": [1], "datatype": "BYTES", "data": ["A" * count]}]}
            ).encode(),
            None,
        ),
        "text": (json.dumps({"outputs": [{}] * 300_000, "inputs": [{}]}).encode(), None),
        "texts": binary("BYTES", [1], elements(_with_texts(_flat(8, 8)))),
        "a flat image": binary("BYTES", [1], elements(_flat(8000, 8000))),
        "a flat image in a long file": binary(
            "BYTES", [1], elements(_flat(8000, 8000) + bytes(count))
        ),
    }
    for name, (body, length) in hostile.items():
        with _limited_memory() as taken:
            refusal(body, None if length is None else str(length))
        assert taken() < (64 << 20) + 4 * len(body), name
    body, length = binary("BYTES", [1], elements(_flat(1400, 1490)))
    with _limited_memory() as taken:
        read_body(body, str(length), (3, 8, 8), 8)
    assert taken() < 64 << 20


_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**64), 1e400, "64", "", [], {}, [1, 1, 8, 8], [1]]),
)
_FLAWS = st.fixed_dictionaries(
    {},
    optional={
        "shape": st.one_of(_ODD, st.lists(_ODD, max_size=5)),
        "datatype": st.one_of(_ODD, st.sampled_from(tensors.DATATYPES)),
        "data": st.one_of(_ODD, st.lists(st.one_of(_ODD, st.text(max_size=8)), max_size=70)),
        "parameters": st.one_of(
            _ODD, st.fixed_dictionaries({}, optional={"binary_data_size": _ODD})
        ),
    },
)
_REST = st.fixed_dictionaries(
    {},
    optional={
        "id": _ODD,
        "outputs": st.one_of(
            _ODD,
            st.lists(
                st.fixed_dictionaries(
                    {"name": st.sampled_from(["label", "class", 1])},
                    optional={"parameters": st.dictionaries(st.just("binary_data"), _ODD)},
                ),
                max_size=3,
            ),
        ),
        "parameters": st.one_of(_ODD, st.dictionaries(st.just("binary_data_output"), _ODD)),
    },
)


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(tensors.DATATYPES),
    flaws=_FLAWS,
    rest=_REST,
    data=st.one_of(st.binary(max_size=80), st.just(bytes(64)), st.just(elements(_PNG))),
    length=st.one_of(st.none(), st.integers(-2, 2), st.text(max_size=3)),
    fits=st.booleans(),
)
def test_no_body_makes_the_parser_raise_anything_but_a_refusal(
    kind: str, flaws: dict[str, Any], rest: dict[str, Any], data: bytes, length: Any, fits: bool
) -> None:
    """Requests that are almost right, which random bytes never are."""
    shape = [1] if kind == "BYTES" else [1, 1, 8, 8]
    parameters = {"binary_data_size": len(data)} if fits else {}
    tensor = {"shape": shape, "datatype": kind, "parameters": parameters, **flaws}
    text = json.dumps({"inputs": [tensor], **rest}).encode()
    said = str(len(text) + length) if isinstance(length, int) else length
    body = text + data if length is not None else text
    attempt(Kind(body, lambda given: read_body(given, said), lambda given, _: given), body)


def test_answers_of_all_kinds_are_read_back() -> None:
    """The labels and names as numpy reads them: int64, and elements behind their lengths."""
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    asked = tensors.Asked("é", images, (("class", True), ("label", True)))
    body, length = tensors.answer(asked, [2, 0, 2], ["a", "b", "猫"], {"model_name": "m"})
    assert length is not None
    value = json.loads(body[:length])
    assert value["id"] == "é"
    sizes = [output["parameters"]["binary_data_size"] for output in value["outputs"]]
    assert sum(sizes) == len(body) - length
    assert body[length : length + sizes[0]] == elements("猫".encode(), b"a", "猫".encode())
    assert np.frombuffer(body[length + sizes[0] :], "<i8").tolist() == [2, 0, 2]
    assert not re.search(rb'"data"', body[:length])
