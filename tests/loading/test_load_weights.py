"""Checkpoint tensors end up in the right place of the right layer, or one message says everything that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loading_helpers import FusedLayer, LoadableModel, random_tensors, save_sharded
from safetensors.torch import save_file

from kvloom.errors import CheckpointError, InternalError
from kvloom.interfaces import ModuleTarget
from kvloom.runtime.weights import load_weights, wanted_tensors
from kvloom_plugins.loaders.dummy import DummyLoader
from kvloom_plugins.loaders.safetensors_loader import SafetensorsLoader


def load(model: LoadableModel, directory: Path) -> None:
    load_weights(model, SafetensorsLoader(), directory)


def refused(tensors: dict[str, torch.Tensor], directory: Path, model: LoadableModel | None = None) -> str:
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load(model or LoadableModel(), directory)
    return str(error.value)


def test_fused_layers_get_every_shard_and_finish_once(tmp_path: Path) -> None:
    model = LoadableModel()
    tensors = random_tensors(model)
    save_sharded(tmp_path, tensors, 3)
    report = load_weights(model, SafetensorsLoader(), tmp_path)
    loaded = model.tensors()
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())
    assert {layer.post_loads for layer in model.layers.values()} == {1}
    assert (report.num_tensors, report.size_bytes) == (len(tensors), sum(t.nbytes for t in tensors.values()))


@pytest.mark.parametrize(("stored", "kept"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
                                              (torch.float16, torch.bfloat16), (torch.float64, torch.float32)])
def test_floating_dtypes_are_cast(tmp_path: Path, stored: torch.dtype, kept: torch.dtype) -> None:
    model = LoadableModel(dtype=kept)
    tensors = random_tensors(model, stored)
    save_file(tensors, tmp_path / "model.safetensors")
    load(model, tmp_path)
    assert all(torch.equal(loaded, tensors[n].to(kept)) for n, loaded in model.tensors().items())


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bool])
def test_a_dtype_that_cannot_be_cast_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_tensors(LoadableModel())
    tensors["model.layers.0.norm.weight"] = tensors["model.layers.0.norm.weight"].to(dtype)
    name = str(dtype).removeprefix("torch.")
    assert f"model.layers.0.norm.weight: {name}, the model needs float32" in refused(tensors, tmp_path)


def test_a_missing_tensor_is_named_with_the_name_that_is_near(tmp_path: Path) -> None:
    tensors = random_tensors(LoadableModel())
    tensors["model.layers.1.self_attn.query_proj.weight"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    message = refused(tensors, tmp_path)
    assert "1 tensors are missing:\n    model.layers.1.self_attn.q_proj.weight (there is " in message
    assert "1 tensors are used by nothing in the model:\n    model.layers.1.self_attn.query_proj.weight" in message


def test_unused_tensors_are_errors_unless_the_model_lists_them(tmp_path: Path) -> None:
    tensors = random_tensors(LoadableModel())
    tensors |= {"lm_head.weight": torch.zeros(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    report = load_weights(LoadableModel(), SafetensorsLoader(), tmp_path)
    assert report.ignored == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    unused = {"model.layers.0.self_attn.q_proj.lora_A": torch.zeros(1), "xlm_head.weight": torch.zeros(1)}
    message = refused(tensors | unused, tmp_path)
    assert "2 tensors are used by nothing" in message
    assert "    lm_head.weight" not in message
    assert "model.layers.0.self_attn.q_proj.lora_A" in message
    assert "xlm_head.weight" in message


def test_names_match_at_dots_only(tmp_path: Path) -> None:
    message = refused(random_tensors(LoadableModel(num_layers=11)), tmp_path, LoadableModel(num_layers=1))
    assert "70 tensors are used by nothing" in message
    assert "missing" not in message


def test_tensors_of_other_pipeline_stages_are_left_alone(tmp_path: Path) -> None:
    class FirstStage(LoadableModel):
        def other_stage_prefixes(self) -> tuple[str, ...]:
            return ("model.layers.1",)

    tensors = random_tensors(LoadableModel(num_layers=2))
    save_file(tensors, tmp_path / "model.safetensors")
    load(FirstStage(num_layers=1), tmp_path)
    message = refused(tensors | {"model.layers.10.x": torch.zeros(1)}, tmp_path, FirstStage(num_layers=1))
    assert "1 tensors are used by nothing in the model:\n    model.layers.10.x" in message


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = random_tensors(LoadableModel())
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(8, 4)
    assert "model.layers.0.self_attn.k_proj.weight: [8, 4], the model needs [4, 8]" in refused(tensors, tmp_path)


def test_long_lists_are_counted_not_printed(tmp_path: Path) -> None:
    message = refused({"x": torch.zeros(1)}, tmp_path, LoadableModel(num_layers=40))
    assert "281 tensors are missing" in message
    assert "... and 271 more" in message
    assert len(message.splitlines()) < 20


def test_optional_tensors_may_be_missing(tmp_path: Path) -> None:
    model = LoadableModel(num_layers=1)
    layer = model.layers["model.layers.0.self_attn"]
    specs = {s: layer.checkpoint_params(s) for s in layer.shards}
    optional = {s: {n: type(p)(p.shape, p.dtype, optional=n == "bias") for n, p in of.items()} for s, of in specs.items()}
    layer.checkpoint_params = lambda shard: optional[shard]
    save_file({n: t for n, t in random_tensors(model).items() if not n.endswith("bias")}, tmp_path / "model.safetensors")
    assert load_weights(model, SafetensorsLoader(), tmp_path).num_tensors == 5


def test_two_modules_that_ask_for_one_name_are_a_bug_of_the_model() -> None:
    class Twice(LoadableModel):
        def module_map(self) -> dict[str, ModuleTarget]:
            class Dotted(FusedLayer):
                def checkpoint_params(self, shard: str | None) -> dict:
                    return {"norm.weight": FusedLayer.checkpoint_params(self, shard)["weight"]}

            return {**super().module_map(), "model.layers.0": ModuleTarget(Dotted({None: 8}, None, torch.float32))}

    with pytest.raises(InternalError, match=r"two modules of Twice ask for model\.layers\.0\.norm\.weight"):
        wanted_tensors(Twice())


def test_wanted_tensors_count_bytes_of_the_parameters_dtype() -> None:
    wanted = wanted_tensors(LoadableModel(dtype=torch.bfloat16))
    assert wanted["model.layers.0.self_attn.k_proj.weight"] == ((4, 8), "bfloat16", 64)


def test_dummy_weights_need_no_files() -> None:
    model = LoadableModel()
    report = load_weights(model, DummyLoader(), Path("/nowhere"))
    assert report.num_tensors == len(model.tensors())
    assert all(t.isfinite().all() for t in model.tensors().values())


MEASURE = """
import json, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import safetensors.torch
from loading_helpers import LoadableModel
from kvloom.runtime.weights import load_weights
from kvloom_plugins.loaders.safetensors_loader import SafetensorsLoader

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous_bytes())

before = anonymous_bytes()
thread = threading.Thread(target=watch)
thread.start()
model = LoadableModel(num_layers=int(sys.argv[3]), width=1024, vocab_size=8192, dtype=torch.bfloat16)
report = load_weights(model, SafetensorsLoader(), Path(sys.argv[1]))
done.set()
thread.join()
weights = sum(p.nbytes for layer in model.layers.values() for p in layer.params.values())
print(json.dumps({"peak": max(peak, anonymous_bytes()) - before, "weights": weights, "tensors": report.num_tensors}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts anonymous memory in /proc")
@pytest.mark.parametrize(("stored", "num_layers"), [(torch.bfloat16, 46), (torch.float32, 20)])
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path, stored: torch.dtype, num_layers: int) -> None:
    tensors = {n: torch.ones(i.shape, dtype=stored) for n, i in wanted_tensors(
        LoadableModel(num_layers=num_layers, width=1024, vocab_size=8192, dtype=torch.bfloat16)).items()}
    save_sharded(tmp_path, tensors, 3)
    del tensors
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), str(Path(__file__).parent), str(num_layers)],
                          capture_output=True, text=True, check=True, timeout=120)
    measured = json.loads(done.stdout)
    assert measured["weights"] > 90e6
    assert measured["weights"] * 0.95 < measured["peak"] <= measured["weights"] * 1.15
