"""`--non-interactive key=value ...`: a configuration without questions."""

from __future__ import annotations

from simpletuner_dmd.cli.wizard import data, gpu
from simpletuner_dmd.cli.wizard.draft import Draft, typed
from simpletuner_dmd.cli.wizard.short import Session, about_recipe
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.flavours import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner_dmd.config.layers import COMMAND_LINE, command_line_layer
from simpletuner_dmd.config.recipes import KIND
from simpletuner_dmd.config.run_options import DEMO

WORDS = ("instance_data_dir", "prompts", "size", "gpu")
"""What is no option of config.json: the data, its shape, and the card that chooses the recipe."""


def take(draft: Draft, tokens: list[str], session: Session, converted: bool) -> None:
    """Puts what was given into the draft. Raises UserError with every mistake in it; then nothing may be written."""
    words, rest = _split(tokens)
    layer = command_line_layer(rest, draft.folders)
    if layer.problems:
        raise UserError(layer.problems)
    values = layer.values
    problems: list[Problem] = []
    known = {str(problem) for problem in draft.merged().problems}
    if "gpu" in words:
        session.card = gpu.memory_of(words["gpu"])
        if session.card is None:
            problems.append(
                Problem(COMMAND_LINE, "gpu", f"found {words['gpu']}, must be memory in GB", "for example gpu=24")
            )
    if draft.is_new and not converted and "recipe" not in values:
        _choose_recipe(draft, values, session)
    for key in ("recipe", *KIND, *(key for key in values if key not in ("recipe", *KIND))):
        if key in values:
            value = values[key]
            value = typed(value) if isinstance(value, str) else value
            draft.set(key, value if value is not None else "none")
    wrong = [problem for problem in draft.merged().problems if str(problem) not in known]
    if problems or wrong:
        raise UserError([*problems, *(Problem(COMMAND_LINE, one.key, one.message, one.fix) for one in wrong)])
    _take_data(draft, words, session)


def _split(tokens: list[str]) -> tuple[dict[str, str], list[str]]:
    words: dict[str, str] = {}
    rest = []
    for token in tokens:
        key, separator, value = token.removeprefix("--").partition("=")
        if separator and key in WORDS:
            words[key] = value
        else:
            rest.append(token)
    return words, rest


def _choose_recipe(draft: Draft, values: dict[str, object], session: Session) -> None:
    model = str(values.get("pretrained_model_name_or_path", ""))
    by_name = next((one.name for one in FLAVOURS.values() if one.hub_id == model), DEFAULT_FLAVOUR)
    flavour = str(values.get("model_flavour", by_name))
    method = values.get("distillation_method", "dmd")
    name = None if method is None or str(method).lower() in ("none", "null", "") else str(method)
    card = session.card or (found.memory if (found := gpu.find()) else None)
    chosen = draft.take_kind(flavour, name, str(values.get("model_type", "lora")), model == DEMO, card)
    print("\n".join(about_recipe(draft, chosen, card)))
    for key in KIND:
        if key in values and draft.has("recipe"):
            del values[key]  # the recipe says it


def _take_data(draft: Draft, words: dict[str, str], session: Session) -> None:
    if "size" in words:
        if mistake := data.shape_problem(draft, words["size"]):
            raise UserError(mistake, file=COMMAND_LINE, key="size")
        data.set_shape(draft, *data.split_shape(words["size"]))
    place = words.get("instance_data_dir", words.get("prompts"))
    if place is None and data.entry_of(draft) is not None:
        return
    if place is None and data.learns_from_videos(draft.options) and not draft.is_demo:
        raise UserError("nothing says where the videos are, and this method learns from them", file=COMMAND_LINE,
                        key="instance_data_dir", fix="instance_data_dir=path/to/the/folder")  # fmt: skip
    shape = data.shape(draft)
    try:
        session.found = data.set_data(draft, place or data.default_place(draft))
    except UserError as error:
        key = "instance_data_dir" if "instance_data_dir" in words else "prompts"
        raise UserError([Problem(COMMAND_LINE, key, one.message, one.fix) for one in error.problems]) from error
    if "size" in words:
        data.set_shape(draft, *shape)
