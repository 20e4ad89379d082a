"""config.py, strict.py, calls.py, yamlio.py: what is read is what was meant, all else is refused.

Kills, among others: an unknown key that is ignored; an override that is dropped; `no` read as
False; a list merged entry by entry; a dump that a second load reads differently.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flowrl.config import check_call, dump_config, load_config, to_dict
from flowrl.configdoc import describe_fields
from flowrl.errors import ConfigError, FlowrlError, closest
from flowrl.schema import OptimConfig
from flowrl.strict import escape, interpolate
from flowrl.yamlio import read_yaml, write_yaml

MINIMAL = """\
run: {name: tiny, steps: 10}
model: {id: shapes}
method: {name: mix_grpo}
data: {train: shapes/train, num_groups: 6, group_size: 24}
rewards:
  - name: shapes_strict
optim:
  lr: 3e-4
compute: {micro_batch_size: 8, rollout_batch_size: 32, decode_batch_size: 16}
eval: {num_steps: 10}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str = MINIMAL, name: str = "rl.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ------------------------------------------------------------------------- what is read


def test_defaults_are_those_of_the_schema(write: Write) -> None:
    reward = {"name": "shapes_strict", "weight": 1.0, "args": {}}
    assert to_dict(load_config(write())) == {
        "run": {
            "name": "tiny",
            "output_dir": "runs",
            "seed": 0,
            "steps": 10,
            "resume": None,
            "max_minutes": None,
            "max_evaluations": None,
        },
        "model": {
            "pipeline": "sd3",
            "id": "shapes",
            "revision": None,
            "guidance_scale": 1.0,
            "height": None,
            "width": None,
            "sampling": {
                "temperature": 1.0,
                "guidance_schedule": "constant",
                "log_prob": "guided",
            },
            "max_sequence_length": 256,
            "dtype": "float32",
            "tuning": "full",
            "lora": {"rank": 32, "alpha": 64.0, "target_modules": None},
            "gradient_checkpointing": False,
            "args": {},
        },
        "method": {"name": "mix_grpo", "args": {}},
        "data": {"train": "shapes/train", "num_groups": 6, "group_size": 24, "shuffle": True},
        "rewards": [reward],
        "scoring": {
            "batch_size": None,
            "parts": 1,
            "retries": 2,
            "backoff_s": 1.0,
            "timeout_s": None,
            "max_invalid": 0.05,
            "window": 20,
            "min_group_share": 0.5,
        },
        "optim": {
            "lr": 3e-4,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 1e-4,
            "max_grad_norm": 1.0,
            "schedule": "constant",
            "warmup_steps": 0,
            "updates_per_rollout": 1,
            "epochs": 1,
            "ema_decay": None,
            "ema_every": 1,
        },
        "compute": {
            "micro_batch_size": 8,
            "rollout_batch_size": 32,
            "decode_batch_size": 16,
            "mixed_precision": "no",
            "recompute_old_log_prob": False,
            "ratio_tolerance": None,
            "threads": None,
        },
        "eval": {
            "data": "shapes/heldout",
            "every": 0,
            "num_steps": 10,
            "guidance_scale": None,
            "samples_per_prompt": 1,
            "seed": 1234,
            "max_prompts": None,
            "rewards": None,
            "num_samples_shown": 8,
        },
        "checkpoint": {"every": 10, "keep": 2},
        "track": {
            "trackers": [],
            "project": "flowrl",
            "entity": None,
            "mode": "offline",
            "tags": [],
            "group": None,
            "image_every": 0,
            "log_every": 1,
        },
        "monitor": {"reward": None, "proxy": None, "early_stop": None},
    }


def test_overrides_are_yaml_and_reach_into_lists(write: Write) -> None:
    config = load_config(
        write(),
        [
            "optim.lr=1e-5",
            "rewards[0].weight=2",
            "rewards.0.args.graded=true",
            "track.trackers=[wandb, tensorboard]",
            "run.name=a=b",
            "optim.betas=[0, .5]",
            "compute.mixed_precision=no",
            "method.args={window: [1, 4], decay: null}",
        ],
    )
    assert config.optim.lr == 1e-5
    assert config.rewards[0].weight == 2.0
    assert isinstance(config.rewards[0].weight, float)
    assert config.rewards[0].args == {"graded": True}
    assert config.track.trackers == ("wandb", "tensorboard")
    assert config.run.name == "a=b"
    assert config.optim.betas == (0.0, 0.5)
    assert config.compute.mixed_precision == "no"
    assert config.method.args == {"window": [1, 4], "decay": None}


def test_an_override_replaces_a_mapping_as_a_whole(write: Write) -> None:
    path = write(MINIMAL.replace("{name: mix_grpo}", "{name: mix_grpo, args: {a: 1, b: 2}}"))
    assert load_config(path, ["method.args={b: 3}"]).method.args == {"b": 3}
    assert load_config(path, ["method.args.b=3"]).method.args == {"a": 1, "b": 3}


def test_a_json_object_is_laid_over_the_config_as_a_file_would_be(write: Write) -> None:
    path = write(
        MINIMAL.replace("{name: mix_grpo}", "{name: mix_grpo, args: {a: 1, b: 2}}").replace(
            "lr: 3e-4", "{lr: 3e-4, ema_decay: 0.9}"
        )
    )
    text = '{"optim": {"lr": 1e-05}, "method.args": {"b": null, "c": "no"}, "rewards.0.weight": 2}'
    config = load_config(path, [text, "run.steps=3"])
    assert (config.optim.lr, config.optim.ema_decay, config.run.steps) == (1e-5, 0.9, 3)
    assert config.method.args == {"a": 1, "b": None, "c": "no"}
    assert config.rewards[0].weight == 2.0
    assert "optim.lr was already set" in refusal(path, text, "optim.lr=1")
    message = refusal(path, '{"optim": {"lrr": 1}}')
    assert "override 'optim.lrr=1'" in message and "did you mean 'lr'?" in message
    assert "expected key=value or a JSON object" in refusal(path, "{'optim': 1}")
    assert "expected key=value" in refusal(path, "{}")


def test_a_base_is_merged_under_the_file_and_lists_are_replaced(write: Write) -> None:
    write(MINIMAL + "track: {trackers: [wandb], tags: [a, b]}\n", "base/all.yaml")
    write("base: base/all.yaml\noptim: {epochs: 2}\ntrack: {tags: [c]}\n", "middle.yaml")
    path = write("base: middle.yaml\nmethod: {args: {x: 1}}\noptim: {lr: 1.0e-3}\n")
    config = load_config(path)
    assert (config.optim.lr, config.optim.epochs) == (1e-3, 2)
    assert (config.method.name, config.method.args) == ("mix_grpo", {"x": 1})
    assert (config.track.trackers, config.track.tags) == (("wandb",), ("c",))


def test_interpolation_sees_files_overrides_and_defaults(write: Write) -> None:
    path = write(MINIMAL.replace("name: tiny", "name: '${method.name}-${eval.seed}-${run.seed}'"))
    assert load_config(path).run.name == "mix_grpo-1234-0"
    assert load_config(path, ["run.seed=7"]).run.name == "mix_grpo-1234-7"
    config = load_config(path, ["eval.num_steps=${run.steps}", "run.name=x"])
    assert config.eval.num_steps == 10  # a number, not the text "10"


def test_a_config_cannot_be_changed(write: Write) -> None:
    config = load_config(write())
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]


def test_records_made_in_code_are_checked_as_well() -> None:
    assert OptimConfig(lr=1.0).betas == (0.9, 0.999)
    with pytest.raises(ValidationError, match="greater than 0"):
        OptimConfig(lr=-1.0)


# ------------------------------------------------------------------------- what is written


def test_a_dump_loads_back_equal_and_states_every_key(write: Write, tmp_path: Path) -> None:
    config = load_config(write(), ["model.tuning=lora", "method.args={x: '\\${y}'}", "run.name=no"])
    path = tmp_path / "resolved.yaml"
    dump_config(config, path)
    assert load_config(path) == config
    assert (config.method.args, config.run.name) == ({"x": "${y}"}, "no")
    assert "ema_every: 1\n" in path.read_text()
    assert not list(tmp_path.glob("*.partial"))


TEXTS = (
    st.text(alphabet=st.characters(codec="utf-8"))
    | st.text(alphabet="\\${}ab:. \n", max_size=8)  # interpolations, escapes and near misses
    | st.sampled_from(
        ["1e-4", "no", "on", "1:30", "010", "~", "", "<<", "???", "2024-01-01", "1_0", ".inf", "="]
    )
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS.filter(lambda key: "${" not in key), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dump") / "values.yaml"


@pytest.mark.parametrize("text", ["${x}", "\\${x}", "a\\\\${", "${\\", "\\", "\x85", "$${", "no"])
def test_texts_that_look_like_something_else_stay_texts(text: str, scratch: Path) -> None:
    write_yaml(escape({"x": text}), scratch)
    assert interpolate(read_yaml(scratch), "values.yaml", {}) == {"x": text}


@given(value=VALUES)
def test_any_plain_value_survives_writing_and_reading(value: Any, scratch: Path) -> None:
    write_yaml(escape({"x": value}), scratch)
    read = interpolate(read_yaml(scratch), "values.yaml", {})
    assert repr(read) == repr({"x": value})  # repr, because 1 == 1.0 == True


# ------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        # unknown keys, at every level, with the closest match
        ("optim.lrr=1", ["optim.lrr is not a key of section 'optim'", "did you mean 'lr'?"]),
        ("optimm.lr=1", ["optimm is not a key", "did you mean 'optim'?"]),
        ("lr=1", ["lr is not a key", "did you mean 'optim.lr'?"]),
        ("model.lora.rnak=1", ["model.lora.rnak is not a key", "did you mean 'rank'?"]),
        ("rewards.0.wieght=1", ["rewards.0.wieght is not a key", "did you mean 'weight'?"]),
        ("rewards=[{name: a, wieght: 2}]", ["rewards.0.wieght", "did you mean 'weight'?"]),
        ("eval.rewards=[{nmae: a}]", ["eval.rewards.0.nmae", "did you mean 'name'?"]),
        ("base=other.yaml", ["base is not a key"]),
        # wrong types
        ("optim.lr=3e-5x", ["optim.lr must be float > 0, got '3e-5x' (str)", "such as"]),
        ("run.steps=yes", ["run.steps must be int >= 1, got 'yes' (str)"]),
        ("run.steps=true", ["run.steps must be int >= 1, got true (bool)"]),
        ("run.steps=10.0", ["run.steps must be int >= 1, got 10.0 (float)"]),
        ("run.steps=0", ["run.steps must be int >= 1, got 0 (int)"]),
        ("run.steps='10'", ["run.steps must be int >= 1, got '10' (str)"]),
        ("run.steps=null", ["run.steps must be int >= 1, got null"]),
        ("run.name=5", ["run.name must be str, got 5 (int)", "quotes"]),
        ("run.name=a/b", ["run.name must be a plain folder name", "run.output_dir"]),
        ("data.shuffle=yes", ["data.shuffle must be bool", "write true or false"]),
        ("optim.lr=.inf", ["optim.lr must be float > 0, got inf", "must be finite"]),
        ("optim.lr=.nan", ["optim.lr must be float > 0, got nan"]),
        ("optim.betas=[0.9]", ["optim.betas must be list of 2", "got [0.9] (list)"]),
        ("optim.betas=[0.9, 1.0]", ["optim.betas.1 must be", "got 1.0 (float)"]),
        ("model.tuning=loar", ["model.tuning must be 'full' or 'lora'", "did you mean 'lora'?"]),
        ("track.trackers=[wandbb]", ["track.trackers.0", "did you mean 'wandb'?"]),
        ("model.lora=3", ["model.lora must be section, got 3", "below it"]),
        ("optim=null", ["optim must be section, got null"]),
        ("method.args=[1]", ["method.args must be mapping, got [1] (list)"]),
        ("eval.rewards=[]", ["eval.rewards must be list of sections", "must not be empty"]),
        ("rewards=[name]", ["rewards.0 must be an entry of list of sections, got 'name'"]),
        # overrides that cannot be carried out, or would do nothing
        ("optim.lr", ["expected key=value"]),
        ("=3", ["expected key=value"]),
        ("optim..lr=3", ["expected key=value"]),
        ("run.name=", ["run.name has no value", "run.name=null"]),
        ("run.name=[a", ["line 1", "correct the YAML"]),
        ("run.name.x=1", ["run.name is 'tiny' (str), which has no keys"]),
        ("rewards.1.weight=1", ["rewards.1 does not exist", "[0]"]),
        ("rewards.first.weight=1", ["rewards.first does not exist"]),
        ("eval.rewards.0.name=a", ["eval.rewards has no entries", "set the whole list"]),
        ("model.lora.rank=8", ["model.lora.rank would do nothing", "model.tuning=lora"]),
        ("optim.ema_every=8", ["optim.ema_every would do nothing", "optim.ema_decay"]),
        ("track.mode=online", ["track.mode would do nothing", "track.trackers"]),
        # interpolations
        ("run.name=${model.idd}", ["run.name", "'model.idd' not found"]),
        ("run.name=${run.name}", ["run.name"]),
        ("run.name=${model", ["run.name"]),
    ],
)
def test_a_wrong_override_is_one_error_naming_file_override_key_and_remedy(
    write: Write, override: str, fragments: list[str]
) -> None:
    path = write()
    message = refusal(path, override)
    for line in message.splitlines():
        assert line.startswith(f"{path}, override '{override}': ")
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("old", "new", "fragments"),
    [
        ("  lr: 3e-4", "  lrr: 3e-4", ["optim.lrr is not a key", "'lr'", "optim.lr is missing"]),
        ("  - name: s", "  - nmae: s", ["rewards.0.nmae", "did you mean 'name'?"]),
        ("optim:\n  lr: 3e-4\n", "", ["optim.lr is missing", "learning rate", "<float > 0>"]),
        (", steps: 10", "", ["run.steps is missing", "add 'steps: <int >= 1>' to section 'run'"]),
        ("lr: 3e-4", "lr: 3e-4\n  lr: 1e-4", ["line 9", "optim.lr is given twice", "line 8"]),
        ("lr: 3e-4", "lr: [3", ["line 9"]),
        ("lr: 3e-4", "lr: &a [*a]", ["optim.lr", "contains itself"]),
        ("lr: 3e-4", "lr: !!python/name:os.system", ["optim.lr has the tag", "plain YAML"]),
        ("lr: 3e-4", "1: 3e-4", ["line 8", "'1', which is not a text", "quotes"]),
        ("lr: 3e-4", "no: 3e-4", ["optim.no is not a key"]),
        ("steps: 10", "steps: 010", ["run.steps must be int >= 1, got '010' (str)"]),
        ("steps: 10", "steps: 1:30", ["run.steps must be int >= 1, got '1:30' (str)"]),
        ("steps: 10", "steps: " + "9" * 5000, ["correct the value"]),
        ("{num_steps: 10}", "", ["eval must be section, got null", "leave it out"]),
    ],
)
def test_a_wrong_file_is_refused_with_key_and_remedy(
    write: Write, old: str, new: str, fragments: list[str]
) -> None:
    assert old in MINIMAL
    path = write(MINIMAL.replace(old, new, 1))
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"- a\n- b\n", "expected a mapping of sections"),
        (b"run: {name: \xff}\n", "not UTF-8"),
        (b"run: a\n---\nrun: b\n", "line 2"),
        (b"run: \x00\n", "correct the YAML"),
    ],
)
def test_a_file_without_a_config_is_refused(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "rl.yaml"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert fragment in message


def test_a_missing_file_names_the_closest_one(write: Write, tmp_path: Path) -> None:
    write(name="quickstart.yaml")
    message = refusal(tmp_path / "quikstart.yaml")
    assert "quikstart.yaml: no such file; did you mean 'quickstart.yaml'?" in message
    assert "holds no YAML file" in refusal(tmp_path / "nowhere" / "rl.yaml")
    assert "cannot be read" in refusal(tmp_path)


def test_all_problems_are_told_at_once(write: Write) -> None:
    path = write(MINIMAL.replace("lr: 3e-4", "lrr: 1").replace("group_size: 24", "group_size: 0"))
    lines = refusal(path, "run.steps=x").splitlines()
    assert [line.startswith(str(path)) for line in lines] == [True] * 4
    assert {"run.steps", "data.group_size", "optim.lr", "optim.lrr"} == {
        line.split(": ", 1)[1].split()[0] for line in lines
    }


def test_a_problem_in_a_base_names_the_base(write: Write) -> None:
    base = write(MINIMAL.replace("lr: 3e-4", "lr: 3e-4\n  epohcs: 2"), "base.yaml")
    path = write("base: base.yaml\nrun: {stepps: 3}\n")
    lines = refusal(path).splitlines()
    assert len(lines) == 2
    assert any(line.startswith(f"{base}: optim.epohcs") for line in lines)
    assert any(line.startswith(f"{path}: run.stepps") for line in lines)


@pytest.mark.parametrize(
    ("base", "fragment"),
    [
        ("rl.yaml", "break the circle"),
        ("bse.yaml", "did you mean 'base.yaml'?"),
        ("[base.yaml]", "base must be the path of a YAML file"),
    ],
)
def test_a_wrong_base_is_refused(write: Write, base: str, fragment: str) -> None:
    write(name="base.yaml")
    path = write(f"base: {base}\n")
    message = refusal(path)
    assert message.startswith(f"{path}: base")
    assert fragment in message


def test_the_same_key_twice_among_overrides_is_refused(write: Write) -> None:
    message = refusal(write(), "optim.lr=1", "optim.lr=2")
    assert "override 'optim.lr=2': optim.lr was already set" in message
    assert "already set" in refusal(write(), "optim.lr=1", "optim={lr: 2}")
    assert load_config(write(), ["optim={lr: 2}", "optim.lr=1"]).optim.lr == 1.0


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["optim.updates_per_rollout=4"], "use 4 or 8 groups"),
        (["optim.updates_per_rollout=12"], "use 12 groups"),
        (["optim.warmup_steps=11"], "exceeds the run's 10 updates"),
        (["rewards=[{name: a}, {name: a}]"], "rewards names 'a' 2 times"),
        (["eval.rewards=[{name: a}, {name: a}]"], "eval.rewards names 'a' 2 times"),
        (["monitor.early_stop=3"], "monitor.early_stop=3 would do nothing without monitor.reward"),
        (["monitor.proxy=a"], "monitor.proxy=a would do nothing without monitor.reward"),
        (["monitor={reward: a, early_stop: 3}"], "eval.every=0 evaluates at both ends only"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(
    write: Write, overrides: list[str], fragment: str
) -> None:
    assert fragment in refusal(write(), *overrides)


# ------------------------------------------------------------------------- calls


def method(
    *,
    clip_range: float = 0.2,
    num_steps: int = 10,
    schedule: Literal["linear", "cosine"] = "linear",
    is_frozen: bool = False,
    window: tuple[int, ...] = (),
    kl_coef: float | None = None,
    pipeline: Any = None,
    table: dict[str, float] | None = None,
    other: Path | None = None,
) -> None:
    """Stands for a method; its body does not matter."""


def test_check_call_converts_what_the_annotations_say() -> None:
    given_args = {"clip_range": 1, "window": [1, 2], "kl_coef": None, "table": {"a": 1}}
    checked = check_call(method, given_args, where="w")
    assert checked == {"clip_range": 1.0, "window": (1, 2), "kl_coef": None, "table": {"a": 1.0}}
    assert isinstance(checked["clip_range"], float)
    assert isinstance(checked["window"], tuple)
    assert given_args["window"] == [1, 2]
    assert check_call(method, {}, where="w") == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"clip_rnage": 1}, "rl.yaml: method.args.clip_rnage is not an argument of method; "
                            "did you mean 'clip_range'?"),
        ({"clip_range": "x"}, "rl.yaml: method.args.clip_range must be float, got 'x' (str)"),
        ({"clip_range": math.nan}, "method.args.clip_range must be float, got nan (float)"),
        ({"num_steps": 1.0}, "method.args.num_steps must be int, got 1.0 (float)"),
        ({"num_steps": True}, "method.args.num_steps must be int, got true (bool)"),
        ({"is_frozen": "yes"}, "method.args.is_frozen must be bool, got 'yes' (str)"),
        ({"schedule": "linaer"}, "method.args.schedule must be 'linear' or 'cosine', got 'linaer'"),
        ({"window": [1, "a"]}, "method.args.window must be list of int, got [1, 'a'] (list)"),
        ({"window": 3}, "method.args.window must be list of int, got 3 (int)"),
        ({"kl_coef": "none"}, "method.args.kl_coef must be float or null, got 'none' (str)"),
    ],
)  # fmt: skip
def test_check_call_refuses_what_does_not_fit(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_call(method, args, where="rl.yaml: method.args")
    assert message in str(caught.value)


def test_check_call_names_missing_and_reserved_arguments() -> None:
    def reward(folder: str, *, device: str, scale: float = 1.0) -> None: ...

    with pytest.raises(
        ConfigError, match=r"w\.folder is missing; reward needs it: add 'folder: <str>'"
    ):
        check_call(reward, {"scale": 1}, where="w", given=["device"])
    with pytest.raises(ConfigError, match=r"w\.device is set by flowrl itself"):
        check_call(reward, {"folder": "x", "device": "cpu"}, where="w", given=["device"])
    assert check_call(reward, {"folder": "x"}, where="w", given=["device"]) == {"folder": "x"}


def test_check_call_takes_classes_partials_and_open_functions() -> None:
    class Reward:
        def __init__(self, size: int = 3) -> None: ...

    def anything(**options: object) -> None: ...

    assert check_call(Reward, {"size": 4}, where="w") == {"size": 4}
    with pytest.raises(ConfigError, match=r"w\.sise is not an argument of Reward.*'size'"):
        check_call(Reward, {"sise": 4}, where="w")
    with pytest.raises(ConfigError, match=r"w\.num_steps must be int"):
        check_call(functools.partial(method, clip_range=1.0), {"num_steps": "x"}, where="w")
    assert check_call(anything, {"x": [1]}, where="w") == {"x": [1]}


# ------------------------------------------------------------------------- documentation


def test_every_key_is_described_with_type_and_default() -> None:
    rows = {row.key: row for row in describe_fields()}
    assert len(rows) == len(describe_fields())
    assert all(row.description and row.type for row in rows.values())
    assert rows["optim.lr"][1:3] == ("float > 0", "required")
    assert rows["model.tuning"][1:3] == ("'full' or 'lora'", "full")
    assert rows["model.revision"][1:3] == ("str or null", "null")
    assert rows["data.shuffle"][1:3] == ("bool", "true")
    assert rows["rewards[].weight"][1:3] == ("float", "1.0")
    assert rows["model.lora.target_modules"].type == "list of str or null"
    assert "model.lora" not in rows


def test_closest_names_the_match_and_the_list() -> None:
    assert closest("clip_rnage", ["lr", "clip_range"]) == (
        "did you mean 'clip_range'? (one of: lr, clip_range)"
    )
    assert closest("GRPO", ["nft", "grpo"]).startswith("did you mean 'grpo'?")
    assert closest("zzz", ["lr", "eps"]) == "one of: lr, eps"
    assert closest("x", []) == "none can be given here"
    assert issubclass(ConfigError, FlowrlError)
