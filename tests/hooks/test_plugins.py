"""Which plugins run, what happens when one is wrong, and what is said about it."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from plugin_sources import LAST_FIRST, policy, registers

from kvloom import LLM, SamplingParams
from kvloom.errors import (
    ConfigError,
    ManifestMismatchError,
    NotRegisteredError,
    PluginConflictError,
    PluginError,
    PluginHookError,
    PluginLoadError,
    PluginVersionError,
)
from kvloom.hooks.discovery import PluginSelection, find_plugins
from kvloom.hooks.loader import load_plugins, load_same
from kvloom.hooks.manifest import Manifest

BROKEN = "raise RuntimeError('no driver found')"


def named(*names: str) -> PluginSelection:
    return PluginSelection(names, "plugins=")


def test_a_strangers_component_is_used_like_ours(install, small_checkpoint: Path) -> None:
    install("acme", {"acme-policies": policy("last-first", "acme_0")})
    with LLM(str(small_checkpoint), scheduling_policy="last-first", max_num_seqs=1) as llm:
        outputs = llm.generate(["a", "b"], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert outputs[1].metrics.first_token_time < outputs[0].metrics.first_token_time


@pytest.mark.parametrize("order", [("acme", "bolt"), ("bolt", "acme")])
def test_one_name_of_two_distributions_is_an_error_that_names_both_in_any_order(install, order: tuple[str, str]) -> None:
    for distribution in order:
        install(distribution, {f"{distribution}-policies": policy("mine", f"{distribution}_0")}, first=True)
    registry = load_plugins(PluginSelection()).registries["schedulers"]
    with pytest.raises(PluginConflictError, match=r"'acme-policies' of acme 1\.0, plugin 'bolt-policies' of bolt 1\.0.*providers="):
        registry.resolve("mine")
    assert registry.resolve("fcfs").origin.is_builtin


@pytest.mark.parametrize("chosen", ["acme", "bolt", "bolt-policies"])
def test_the_configuration_chooses_between_two_providers(install, chosen: str) -> None:
    for distribution in ("acme", "bolt"):
        install(distribution, {f"{distribution}-policies": policy("mine", f"{distribution}_0")})
    plugins = load_plugins(PluginSelection(), providers={"schedulers": {"mine": chosen}})
    assert plugins.registries["schedulers"].resolve("mine").origin.distribution == chosen.split("-")[0]


def test_a_provider_that_does_not_offer_the_name_is_an_error(install) -> None:
    install("acme", {"acme-policies": policy("mine", "acme_0")})
    plugins = load_plugins(PluginSelection(), providers={"schedulers": {"mine": "bolt"}})
    with pytest.raises(NotRegisteredError, match="by 'bolt', which the configuration chooses"):
        plugins.registries["schedulers"].resolve("mine")


def test_an_unknown_kind_of_provider_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no kind 'sampler'; did you mean 'samplers'"):
        load_plugins(PluginSelection(), providers={"sampler": {"x": "y"}})


def test_a_named_plugin_that_breaks_is_fatal_with_its_own_exception(install) -> None:
    install("acme", {"acme-policies": BROKEN})
    with pytest.raises(PluginLoadError, match=r"plugin 'acme-policies' of acme 1\.0 cannot be imported.*no driver found") as caught:
        load_plugins(named("acme-policies"))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert traceback.extract_tb(caught.value.__cause__.__traceback__)[-1].filename.endswith("acme_0.py")


@pytest.mark.parametrize("source", [BROKEN, "import sys; sys.exit(3)", "import surely_missing_module"])
def test_an_installed_plugin_that_breaks_is_left_out_and_named_in_every_miss(install, capsys, source: str) -> None:
    install("acme", {"acme-policies": source})
    plugins = load_plugins(PluginSelection())
    assert "acme-policies" in capsys.readouterr().err
    with pytest.raises(NotRegisteredError, match="plugin 'acme-policies' of acme 1.0: left out: .*cannot be imported"):
        plugins.registries["schedulers"].resolve("last-first")
    assert plugins.registries["schedulers"].resolve("fcfs")


def test_a_plugin_is_taken_whole_or_not_at_all(install) -> None:
    half_way = '"acme_0:X")\n    raise OSError("half way")'
    install("acme", {"acme-policies": registers("schedulers", "mine", "acme_0:X").replace('"acme_0:X")', half_way)})
    plugins = load_plugins(PluginSelection())
    assert "mine" not in plugins.registries["schedulers"].names()
    with pytest.raises(PluginLoadError, match="its hook kvloom_register_schedulers raised OSError: half way"):
        load_plugins(named("acme-policies"))


def test_a_misspelt_hook_is_found_with_the_near_name(install) -> None:
    source = registers("schedulers", "x", "acme_0:X")
    install("acme", {"acme": source.replace("kvloom_register_schedulers", "kvloom_register_scheduler")})
    with pytest.raises(PluginHookError, match="kvloom_register_scheduler, which is no hook; did you mean 'kvloom_register_schedul"):
        load_plugins(named("acme"))


def test_a_hook_with_wrong_arguments_is_found_with_the_right_ones(install) -> None:
    install("acme", {"acme": registers("schedulers", "x", "acme_0:X").replace("(registry)", "(registrar)")})
    with pytest.raises(PluginHookError, match=r"kvloom_register_schedulers\(registrar\) must be kvloom_register_schedulers\(registry\)"):
        load_plugins(named("acme"))


def test_a_hook_of_a_newer_core_may_be_declared_optional(install) -> None:
    install("acme", {"acme": """
from kvloom import hookimpl
@hookimpl(optionalhook=True)
def kvloom_register_teleporters(registry):
    pass
"""})
    assert any(e.plugin == "acme" for e in load_plugins(named("acme")).manifest.entries)


def test_another_contract_version_is_refused_in_one_line(install) -> None:
    install("acme", {"acme": registers("schedulers", "x", "acme_0:X", version=7)})
    with pytest.raises(PluginVersionError) as caught:
        load_plugins(named("acme"))
    message = str(caught.value)
    assert "\n" not in message
    for part in ("'acme'", "acme 1.0", "kvloom_register_schedulers", "version 7", "version 0"):
        assert part in message


@pytest.mark.parametrize("declared", ["", "KVLOOM_API = {'models': 0}", "KVLOOM_API = {'schedulers': 1.0}", "KVLOOM_API = 0"])
def test_a_hook_without_a_declared_contract_version_is_refused(install, declared: str) -> None:
    source = registers("schedulers", "x", "acme_0:X")
    install("acme", {"acme": source.replace('KVLOOM_API = {"schedulers": 0}', declared)})
    with pytest.raises(PluginVersionError):
        load_plugins(named("acme"))


def test_a_name_that_is_not_installed_is_an_error_with_near_names_and_places(install) -> None:
    install("acme", {"acme-policies": policy("mine", "acme_0")})
    with pytest.raises(NotRegisteredError, match=r"(?s)'acme-policy', which is not installed; did you mean 'acme-policies'.*searched in"):
        load_plugins(named("acme-policy"))


def test_naming_plugins_does_not_import_the_others(install) -> None:
    install("evil", {"evil": "raise SystemExit('imported although nobody named it')"})
    install("acme", {"acme-policies": policy("mine", "acme_0")})
    plugins = load_plugins(named("acme-policies"))
    assert "evil_0" not in sys.modules
    with pytest.raises(NotRegisteredError, match="plugin 'evil' of evil 1.0: installed, not enabled"):
        plugins.registries["schedulers"].resolve("nobody")


def test_the_environment_names_plugins_and_the_argument_wins(install, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.config import EngineConfig

    install("acme", {"acme-policies": policy("mine", "acme_0")})
    monkeypatch.setenv("KVLOOM_PLUGINS", "acme-policies, ")
    assert EngineConfig.from_kwargs(model="m").selection == PluginSelection(("acme-policies",), "KVLOOM_PLUGINS")
    assert EngineConfig.from_kwargs(model="m", plugins=[]).selection.named == ()
    monkeypatch.delenv("KVLOOM_PLUGINS")
    assert EngineConfig.from_kwargs(model="m").selection.named is None


def test_two_distributions_with_one_plugin_name_cannot_be_named(install) -> None:
    for distribution in ("acme", "bolt"):
        install(distribution, {"policies": policy(distribution, f"{distribution}_0")})
    assert {"acme", "bolt"} <= set(load_plugins(PluginSelection()).registries["schedulers"].names())
    with pytest.raises(PluginConflictError, match="several distributions have"):
        load_plugins(named("policies"))


def test_stale_metadata_is_noticed(install) -> None:
    install("acme", {"acme-policies": policy("old", "acme_0")}, version="0.9")
    install("acme", {"acme-policies": policy("new", "acme_0")}, version="1.0", first=True)
    installed = find_plugins()
    assert [o.version for o in installed.origins if o.plugin == "acme-policies"] == ["1.0"]
    assert any("acme 0.9" in note and "shadowed" in note for note in installed.notes)


@pytest.mark.parametrize(("call", "message"), [
    ('registry.add("", "a:B")', "not empty"),
    ('registry.add("x", "no colon")', "package.module:Class"),
    ('registry.add("x", "a:B", config="nothing")', "pydantic model"),
    ('registry.add("x", "a:B"); registry.add("x", "a:C")', "twice"),
])
def test_a_wrong_registration_is_refused_at_its_own_line(install, call: str, message: str) -> None:
    install("acme", {"acme": registers("schedulers", "x", "a:B").replace('registry.add("x", "a:B")', call)})
    with pytest.raises(PluginError, match=message) as caught:
        load_plugins(named("acme"))
    assert any(frame.filename.endswith("acme_0.py") for frame in traceback.extract_tb(caught.value.__traceback__))


def test_registering_after_start_up_is_refused(install) -> None:
    install("acme", {"acme": registers("schedulers", "x", "acme_0:X")})
    registry = load_plugins(named("acme")).registries["schedulers"]
    with pytest.raises(PluginError, match="after start-up"):
        registry.add(registry.resolve("x"))


@pytest.mark.parametrize(("target", "message"), [("acme_0:Nothing", "cannot be loaded"), ("acme_0:Wrong", "no subclass of"),
                                                 ("acme_9:X", "cannot be loaded")])
def test_a_target_that_is_not_of_its_kind_is_refused_when_it_is_used(install, target: str, message: str) -> None:
    install("acme", {"acme": registers("schedulers", "x", target, extra="class Wrong: pass")})
    entry = load_plugins(named("acme")).registries["schedulers"].resolve("x")
    with pytest.raises(PluginLoadError, match=f"plugin 'acme' of acme 1.0.*{message}"):
        entry.load()


CONFIGURED = LAST_FIRST + """
from pydantic import BaseModel, ConfigDict
class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    strength: int = 3
KVLOOM_CONFIG = Settings
"""


def test_a_plugins_configuration_reaches_its_components_engine_by_engine(install) -> None:
    install("acme", {"acme": registers("schedulers", "mine", "acme_0:LastFirst", extra=CONFIGURED)})
    classes = [load_plugins(named("acme"), {"acme": section}).registries["schedulers"].resolve("mine").load()
               for section in ({"strength": 5}, {})]
    assert [cls.plugin_config.strength for cls in classes] == [5, 3]
    assert classes[0]().plugin_config.strength == 5


@pytest.mark.parametrize(("section", "message"), [({"strength": "much"}, "strength"), ({"stregth": 1}, "stregth")])
def test_a_wrong_plugin_configuration_is_refused(install, section: dict, message: str) -> None:
    install("acme", {"acme": registers("schedulers", "mine", "acme_0:LastFirst", extra=CONFIGURED)})
    with pytest.raises(ConfigError, match=f"plugin 'acme' of acme 1.0: {message}"):
        load_plugins(named("acme"), {"acme": section})


def test_configuration_for_a_plugin_that_takes_none_or_does_not_run_is_refused(install) -> None:
    install("acme", {"acme": policy("mine", "acme_0")})
    with pytest.raises(ConfigError, match="takes no configuration"):
        load_plugins(named("acme"), {"acme": {}})
    with pytest.raises(ConfigError, match="no such plugin runs; did you mean 'acme'"):
        load_plugins(named("acme"), {"acne": {}})


LOAD_SAME = """
import sys
sys.path[:0] = {path!r}
from kvloom.hooks.loader import load_same
from kvloom.hooks.manifest import Manifest
print(load_same(Manifest.from_json(sys.stdin.read())).manifest.hash)
"""


def test_a_second_process_loads_what_the_manifest_says(install, tmp_path: Path) -> None:
    install("acme", {"acme": registers("schedulers", "mine", "acme_0:LastFirst", extra=CONFIGURED)})
    install("other", {"other": policy("other", "other_0")})
    manifest = load_plugins(named("acme"), {"acme": {"strength": 5}}).manifest

    def second_process() -> subprocess.CompletedProcess:
        code = LOAD_SAME.format(path=[str(tmp_path / "site")])
        return subprocess.run([sys.executable, "-c", code], input=manifest.to_json(), capture_output=True, text=True, timeout=60)

    assert second_process().stdout.strip() == manifest.hash
    module = tmp_path / "site" / "acme_0.py"
    module.write_text(module.read_text() + "\n# changed\n")
    failed = second_process()
    assert failed.returncode
    assert "ManifestMismatchError" in failed.stderr
    assert "acme of acme has module_sha256" in failed.stderr


def test_a_manifest_names_every_difference(install) -> None:
    install("acme", {"acme": policy("mine", "acme_0")})
    manifest = load_plugins(named("acme")).manifest
    data = json.loads(manifest.to_json())
    data["entries"][-1]["version"] = "2.0"
    data["entries"].append({**data["entries"][-1], "plugin": "ghost"})
    with pytest.raises(ManifestMismatchError, match=r"(?s)acme of acme has version: '1\.0', not '2\.0'.*ghost of acme is missing"):
        Manifest.from_json(json.dumps(data)).check_same(manifest)
    assert load_same(manifest).manifest == manifest


def test_a_deployment_file_runs_only_the_plugins_that_it_names(install, small_checkpoint: Path, tmp_path: Path) -> None:
    install("acme", {"acme": policy("mine", "acme_0")})
    file = tmp_path / "engine.yaml"
    file.write_text(f"model: {small_checkpoint}\nscheduling_policy: mine\n")
    with pytest.raises(ConfigError, match="(?s)scheduling_policy='mine': nothing is registered.*installed, not enabled"):
        LLM.from_config(file)
    file.write_text(file.read_text() + "plugins: [acme]\n")
    with LLM.from_config(file) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)[0].finished
