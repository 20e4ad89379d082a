"""Finds a reward by name and makes it: a table of ours, plug-ins, a dotted path, or a file.

Nothing is imported before its name is asked for. Errors are plain LookupError and ValueError, with
the closest match and the list; whoever reads a configuration adds the file and the key.
"""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rewards.base import Reward

# name -> (module:attribute, arguments that the name implies)
_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "shapes_strict": ("rewards.shapes.reward:ShapesReward", {"graded": False}),
    "shapes_graded": ("rewards.shapes.reward:ShapesReward", {"graded": True}),
    "shapes_quality": ("rewards.shapes.quality:ShapesQuality", {}),
    "shapes_gold": ("rewards.shapes.quality:ShapesGold", {}),
    "shapes_proxy": ("rewards.shapes.proxy:ShapesProxy", {}),
    "win_rate": ("rewards.pairwise:WinRate", {}),
    "brightness": ("rewards.simple:Brightness", {}),
    "jpeg_compressibility": ("rewards.simple:JpegSize", {"compress": True}),
    "jpeg_incompressibility": ("rewards.simple:JpegSize", {"compress": False}),
    "pickscore": ("rewards.pickscore:PickScore", {}),
    "clip_score": ("rewards.clip_score:ClipScore", {}),
    "hps_v2": ("rewards.hps_v2:HpsV2", {}),
    "aesthetic": ("rewards.aesthetic:Aesthetic", {}),
    "siglip": ("rewards.siglip:Siglip", {}),
    "image_reward": ("rewards.image_reward:ImageReward", {}),
    "diversity": ("rewards.diversity:Diversity", {}),
    "colourfulness": ("rewards.colourfulness:Colourfulness", {}),
    "vqa_score": ("rewards.vqa_score:VqaScore", {}),
    "remote": ("rewards.serving.client:RemoteReward", {}),
    "remote_judge": ("rewards.serving.client:RemoteJudge", {}),
    "geneval": ("rewards.geneval:GenEval", {}),
    "ocr": ("rewards.ocr:Ocr", {}),
    "vlm_judge": ("rewards.vlm_judge:VlmJudge", {}),
    "vlm_pair_judge": ("rewards.vlm_judge:VlmPairJudge", {}),
    "unified_reward": ("rewards.unified_reward:UnifiedReward", {}),
    "unified_reward_pairs": ("rewards.unified_reward:UnifiedRewardPairs", {}),
    "hps_v3": ("rewards.hps_v3:HpsV3", {}),
    "video_align": ("rewards.video_align:VideoAlign", {}),
}
NAMES = tuple(_TABLE)
PLUGINS = "flowrl.rewards"  # the entry-point group in which other distributions register theirs
_MEMBERS = ("inputs", "scope", "range", "higher_is_better", "score")


def load(name: str, **args: Any) -> "Reward":
    """The reward called `name`, made with `args`.

    Args:
        name: one of `NAMES` or of the plug-ins, "package.module:Name", or "./file.py:name". A class
            is made with `args`; a function is a reward of the inputs that it names as parameters.
        args: keyword arguments of the reward.

    Raises:
        LookupError: if there is no such name, module, file or attribute.
        ValueError: if the arguments do not fit, or what was found is not a reward.
    """
    made = make(name, **args)
    check_members(name, made)
    return cast("Reward", made)


def make(name: str, **args: Any) -> Any:
    """As `load`, but whatever the class makes: a judge of pairs is found by the same names.

    Raises:
        LookupError, ValueError: as `load`, except that what was made need not be a reward.
    """
    found, implied = find(name)
    if inspect.isclass(found):
        _check_args(name, found, args, taken=tuple(implied), inputs=())
        return found(**implied, **args)
    if not callable(found):
        raise ValueError(f"reward {name!r} is {type(found).__name__}; expected a class or function")

    from rewards.base import INPUTS, FunctionReward

    _check_args(name, found, args, taken=(), inputs=INPUTS)
    return FunctionReward(found, args)


def check_members(name: str, made: Any) -> None:
    """Raises ValueError unless `made` has the members of a reward."""
    missing = [member for member in _MEMBERS if not hasattr(made, member)]
    if missing:
        raise ValueError(f"reward {name!r} is not a reward: it lacks {', '.join(missing)}")


def find(name: str) -> tuple[Any, dict[str, Any]]:
    """The class or function behind a name, and the arguments that the name implies."""
    path, implied = _TABLE.get(name, (name, {}))
    if ":" in path:
        try:
            return attribute(path), implied
        except LookupError as error:
            raise LookupError(f"reward {name!r}: {error}") from error
    plugins = {entry.name: entry for entry in entry_points(group=PLUGINS)}
    if name in plugins:
        return plugins[name].load(), {}
    known = (*NAMES, *plugins)
    raise LookupError(f"{name!r} is not a reward{_hint(name, known)} (or 'package.module:Name', "
                      "or './file.py:function')")  # fmt: skip


def attribute(path: str) -> Any:
    """What "package.module:Name" or "./file.py:name" points to.

    Raises:
        LookupError: there is no such module, file or attribute; who asks says for what.
    """
    origin, _, name = path.rpartition(":")
    module = _import_file(origin) if origin.endswith(".py") else _import(origin)
    if not name or not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise LookupError(f"{origin} has no {name!r}{_hint(name, public)}")
    return getattr(module, name)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A missing dependency of a module that exists is the author's to see as it is.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise LookupError(
            f"there is no module {error.name!r}; expected 'package.module:Name' "
            "of an installed package, or './file.py:function'"
        ) from error


def _import_file(file: str) -> Any:
    path = Path(file).expanduser().resolve()
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise LookupError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass in the file looks for its own module
    spec.loader.exec_module(module)
    return module


def _check_args(
    name: str,
    target: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    taken: tuple[str, ...],
    inputs: tuple[str, ...],
) -> None:
    """Raises ValueError unless `args` are what `target` needs beside `taken` and `inputs`."""
    parameters = inspect.signature(target).parameters
    reserved = {*taken, *inputs}
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    free = [p for p in named if p.name not in reserved]
    allowed = [p.name for p in free]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in args:
        if key in reserved or (key not in allowed and not open_ended):
            raise ValueError(f"{key!r} is not an argument of reward {name!r}{_hint(key, allowed)}")
    missing = [p.name for p in free if p.default is p.empty and p.name not in args]
    if missing:
        raise ValueError(f"reward {name!r} needs {', '.join(missing)}; given: "
                         f"{', '.join(args) or 'nothing'}")  # fmt: skip


def _hint(name: str, known: Iterable[str]) -> str:
    """The closest match and the list, as the tail of a message."""
    known = sorted(known)
    if not known:
        return "; it takes none"
    close = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{guess} known: {', '.join(known)}"
