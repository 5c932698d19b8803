"""Other copies of the weights in a checkpoint's folder are told from what belongs to it."""

import json
from pathlib import Path

import pytest

from sparseprune.checkpoint import open_checkpoint
from tests.checkpoint.files import Tensors, write

WEIGHTS: Tensors = [("embed.weight", "F32", (8, 4)), ("head.weight", "F32", (8, 4))]
OTHERS: Tensors = [("linear.weight", "F32", (8, 4))]
PICKLE = b"\x80\x02" + bytes(1000)
CONFIG = {"model_type": "llama", "hidden_size": 4, "transformers_version": "5.0"}


def sorted_out(at: Path) -> tuple[set[str], set[str]]:
    """The paths that are left out, and those that are copied."""
    found = open_checkpoint(at)
    assert not {one.path for one in found.left_out} & {one.path for one in found.others}
    assert all(one.nbytes == (at / one.path).stat().st_size for one in found.left_out)
    return {str(one.path) for one in found.left_out}, {str(one.path) for one in found.others}


def fill(at: Path, *names: str, content: bytes = b"") -> None:
    for name in names:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(content)


COPIES = [
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.fp16.bin", "model.bin"),
    *("pytorch_model.bin.index.json", "consolidated.00.pth", "original/consolidated.00.pth", "model.pt"),
    *("last.ckpt", "bert_model.ckpt.data-00000-of-00001", "bert_model.ckpt.index", "weights.pkl"),
    *("onnx/model_quantized.onnx", "onnx/model.onnx_data", "onnx/decoder.onnx.data", "tf_model.h5"),
    *("openvino/openvino_model_qint8.bin", "openvino/openvino_model_qint8.xml", "metal/model.bin"),
    *("m-Q4_K_M.gguf", "flax_model.msgpack", "flax_model.msgpack.index.json", "rust_model.ot"),
    *("coreml/m.mlpackage/Data/com.apple.CoreML/weights/weight.bin", "coreml/m.mlmodelc/coremldata.bin"),
    *("global_step5/mp_rank_00_model_states.pt", "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    *("pytorch_model_fsdp_0/__0_0.distcp", "saved_model/saved_model.pb", "checkpoint-5/pytorch_model.bin"),
]
KEPT = [
    *(
        "config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.bin",
        "generation_config.json",
    ),
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.bin", "rng_state_0.pth", "optimizer.bin"),
    *("random_states_0.pkl", "mm_projector.bin", "original/params.json", "original/tokenizer.model"),
    *(
        "onnx/config.json", "modeling_x.py", "images/model.png", "README.md", "latest",
        "openvino_tokenizer.bin",
    ),
    *("openvino_detokenizer.xml", "value_head.bin", "adapter_model.bin", "adapter_config.json"),
]  # fmt: skip


def test_copies_in_other_formats_are_told_from_small_files_by_their_names(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", WEIGHTS)
    fill(tmp_path, *COPIES, *KEPT)
    left_out, copied = sorted_out(tmp_path)
    assert (left_out, copied) == (set(COPIES), set(KEPT))


def test_variants_and_shards_that_nobody_reads_are_copies_and_so_are_their_indexes(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", WEIGHTS)
    copies = [
        *("model.fp16.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("consolidated.safetensors", "original/model.safetensors", "original/sub/x.safetensors"),
        *("consolidated-00001-of-00002.safetensors", "diffusion_pytorch_model.non_ema.safetensors"),
    ]
    for name in copies:
        write(tmp_path / name, OTHERS)
    copies += ["consolidated.safetensors.index.json", "model.safetensors.index.fp16.json"]
    for name in copies[-2:]:
        place = "consolidated-00001-of-00002.safetensors"
        fill(tmp_path, name, content=json.dumps({"weight_map": {"linear.weight": place}}).encode())
    write(tmp_path / "value_head.safetensors", OTHERS)
    assert sorted_out(tmp_path) == (set(copies), {"value_head.safetensors"})


def test_an_index_that_is_read_stays_beside_shards_that_it_does_not_list(tmp_path: Path) -> None:
    write(tmp_path / "model-00001-of-00001.safetensors", WEIGHTS)
    write(tmp_path / "model-00003-of-00003.safetensors", OTHERS)
    weight_map = dict.fromkeys((name for name, _, _ in WEIGHTS), "model-00001-of-00001.safetensors")
    fill(tmp_path, "model.safetensors.index.json", content=json.dumps({"weight_map": weight_map}).encode())
    assert sorted_out(tmp_path) == ({"model-00003-of-00003.safetensors"}, {"model.safetensors.index.json"})


@pytest.mark.parametrize(
    ("tensors", "is_copy"),
    [
        (WEIGHTS, True),
        ([(name, "F16", shape) for name, _, shape in WEIGHTS], True),
        ([*WEIGHTS, ("more", "F32", (63,))], True),
        ([*WEIGHTS, ("more", "F32", (64,))], False),
        ([(name, "BOOL", shape) for name, _, shape in WEIGHTS], False),
        ([(name, dtype, (4, 4)) for name, dtype, _ in WEIGHTS], False),
        (OTHERS, False),
        ([], False),
    ],
)
def test_a_file_of_any_name_that_has_most_tensors_by_name_and_shape_is_a_copy(
    tmp_path: Path, tensors: Tensors, is_copy: bool
) -> None:
    write(tmp_path / "model.safetensors", WEIGHTS)
    write(tmp_path / "checkpoint-5" / "model.safetensors", tensors)
    assert sorted_out(tmp_path)[0] == ({"checkpoint-5/model.safetensors"} if is_copy else set())


def test_a_broken_file_of_an_unknown_name_is_copied(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", WEIGHTS)
    fill(tmp_path, "sub/model.safetensors", content=b"no header")
    assert sorted_out(tmp_path) == (set(), {"sub/model.safetensors"})


@pytest.mark.parametrize(
    ("document", "folder"),
    [
        ([{"path": ""}, {"path": "2_Dense"}, {"path": 3}, 5], "2_Dense"),
        ({"_class_name": "Pipeline", "vae": ["diffusers", "AutoencoderKL"]}, "vae"),
    ],
)
def test_what_lies_in_the_folder_of_another_module_belongs_there(
    tmp_path: Path, document: object, folder: str
) -> None:
    write(tmp_path / "model.safetensors", WEIGHTS)
    name = "modules.json" if isinstance(document, list) else "model_index.json"
    (tmp_path / name).write_text(json.dumps(document))
    write(tmp_path / folder / "model.safetensors", WEIGHTS)
    fill(tmp_path, f"{folder}/pytorch_model.bin", "other/pytorch_model.bin", content=PICKLE)
    left_out, copied = sorted_out(tmp_path)
    assert left_out == {"other/pytorch_model.bin"}
    assert copied == {name, f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin"}


@pytest.mark.parametrize("text", ["", "[", "3", "[[]]", '{"b": 1}', "\xff", "[" * 100_000])
def test_a_list_of_modules_that_makes_no_sense_names_none(tmp_path: Path, text: str) -> None:
    write(tmp_path / "model.safetensors", WEIGHTS)
    (tmp_path / "modules.json").write_text(text, encoding="latin-1")
    fill(tmp_path, "a/pytorch_model.bin")
    assert sorted_out(tmp_path)[0] == {"a/pytorch_model.bin"}


@pytest.mark.parametrize(
    ("change", "is_copy"),
    [({"transformers_version": "4"}, True), ({"sparseprune": {}}, True), ({"hidden_size": 2}, False)],
)
def test_a_pickle_beside_the_config_of_another_model_is_that_model(
    tmp_path: Path, change: dict[str, object], is_copy: bool
) -> None:
    write(tmp_path / "model.safetensors", WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    fill(tmp_path, "draft/pytorch_model.bin", "draft/model.onnx")
    (tmp_path / "draft" / "config.json").write_text(json.dumps(CONFIG | change))
    left_out = sorted_out(tmp_path)[0]
    assert left_out == {"draft/model.onnx"} | ({"draft/pytorch_model.bin"} if is_copy else set())


LARGE = {"protocol 2": (PICKLE, True), "a zip": (b"PK\x03\x04" + bytes(96), True)}
LARGE |= {"a small one": (PICKLE[:9], False), "another format": (b"mmap" * 99, False)}


@pytest.mark.parametrize(("content", "is_copy"), LARGE.values(), ids=LARGE)
def test_a_pickle_of_any_name_is_a_copy_if_it_is_large(tmp_path: Path, content: bytes, is_copy: bool) -> None:
    """The weights take 256 bytes and a header. A language model of n-grams is large, too, and no pickle."""
    write(tmp_path / "model.safetensors", WEIGHTS)
    fill(tmp_path, "lm/5gram.bin", content=content)
    assert ("lm/5gram.bin" in {str(one.path) for one in open_checkpoint(tmp_path).others}) == (not is_copy)


def test_adapters_are_no_copies(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", WEIGHTS)
    write(tmp_path / "lora" / "adapter_model.safetensors", WEIGHTS)
    fill(tmp_path, "lora/adapter_config.json", content=b"{}")
    fill(tmp_path, "lora/adapter_model.bin", content=PICKLE)
    assert sorted_out(tmp_path)[0] == set()


def test_a_single_file_has_no_copies(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", WEIGHTS)
    fill(tmp_path, "pytorch_model.bin")
    found = open_checkpoint(tmp_path / "model.safetensors")
    assert (found.others, found.left_out) == ((), ())
