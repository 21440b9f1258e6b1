"""The pages about conversion say what the code does: its keys, its options, its errors."""

import ast
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from transformers_llava_sp.cli import app
from transformers_llava_sp.configuration_llava_sp import LlavaSPProjectorConfig
from transformers_llava_sp.conversion import ConversionError, convert_checkpoint, merge_adapter
from transformers_llava_sp.conversion import original as authors
from transformers_llava_sp.conversion.original import OriginalConfig, rename_key
from transformers_llava_sp.conversion.plan import VOCABULARY_MULTIPLE
from transformers_llava_sp.conversion.staging import CONVERTED_FILES


REPOSITORY = Path(__file__).parent.parent
CONVERSION_SOURCES = sorted((REPOSITORY / "src" / "transformers_llava_sp" / "conversion").glob("*.py"))
PAGES = [REPOSITORY / "docs" / "conversion.md", REPOSITORY / "docs" / "conversion-errors.md"]
GUIDE, ERRORS = (page.read_text(encoding="utf-8") for page in PAGES)

# What stands for a part of a message that differs from case to case: on the page, and in what is read from the source
ELLIPSIS = "…"
VARIABLE = "\0"
# The checks after writing have one entry, as what to do is the same
MAX_MESSAGES_OF_AN_ENTRY = 9


def table(page: str, *header: str) -> list[list[str]]:
    """The rows of the one table with this header, in all cells of which code is left in backticks."""
    lines = page.splitlines()
    [start] = [index for index, line in enumerate(lines) if line == f"| {' | '.join(header)} |"]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")])
        assert len(rows[-1]) == len(header), line
    assert rows
    return rows


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def is_call(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def template(node: ast.expr, arguments: dict[str, str]) -> str:
    """A string expression, with `VARIABLE` for what is not known before it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, arguments) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, arguments) if node.conversion == -1 else VARIABLE
    if isinstance(node, ast.Name):
        return arguments.get(node.id, VARIABLE)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "strip":
        return template(node.func.value, arguments)
    return VARIABLE


def error_messages() -> dict[str, str]:
    """
    The message of every `ConversionError` in the source, by place. A function that only words an error, such as
    `refuse`, counts once for each call of it.
    """
    found = {}
    for path in CONVERSION_SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wording: dict[str, ast.FunctionDef] = {
            node.name: node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any(isinstance(step, ast.Return) and is_call(step.value, "ConversionError") for step in node.body)
        }
        inside = {id(node) for function in wording.values() for node in ast.walk(function)}
        for node in ast.walk(tree):
            if is_call(node, "ConversionError") and id(node) not in inside:
                found[f"{path.name}:{node.lineno}"] = template(node.args[0], {})
            elif is_call(node, *wording):
                function = wording[node.func.id]
                names = [argument.arg for argument in function.args.args]
                arguments = {name: template(value, {}) for name, value in zip(names, node.args, strict=True)}
                [step] = [step for step in function.body if isinstance(step, ast.Return)]
                found[f"{path.name}:{node.lineno}"] = template(step.value.args[0], arguments)
    return found


def wrapped_messages() -> list[str]:
    """What a message of only a file and a reason can say: the reasons are those of the projector's configuration."""
    tree = ast.parse(inspect.getsource(LlavaSPProjectorConfig))
    return [f"{VARIABLE}: {template(node.args[0], {})}" for node in ast.walk(tree) if is_call(node, "ValueError")]


MESSAGES = error_messages()
WRAPPERS = [place for place, message in MESSAGES.items() if message == f"{VARIABLE}: {VARIABLE}"]
ERROR_ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in ERRORS.splitlines()
    if line.startswith("| ") and not line.startswith("| message |")
]
ENTRIES = [message for row in ERROR_ROWS for message in code(row[0])]


def matches(entry: str, message: str) -> bool:
    """Whether an entry of the page is the start of a message, `ELLIPSIS` standing for anything."""
    pattern = ".*".join(re.escape(part) for part in entry.split(ELLIPSIS))
    return re.match(pattern, message, re.DOTALL) is not None


def test_messages_are_read_from_the_source():
    texts = [message for place, message in MESSAGES.items() if place not in WRAPPERS]
    assert all(re.search(r"[a-z]{3}", text) for text in texts)
    assert len(WRAPPERS) == 1
    # One of each kind: plain, worded by a function of the module, worded by one inside a method
    assert f"{VARIABLE} is missing." in texts
    assert any(text.startswith("The converted weights, read again, are wrong: the processor has ") for text in texts)
    assert any(text.startswith(f"{VARIABLE}: mm_hidden_size is {VARIABLE}: expected") for text in texts)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_is_a_message_of_the_source(entry):
    assert any(matches(entry, message) for message in [*MESSAGES.values(), *wrapped_messages()])


@pytest.mark.parametrize("place", MESSAGES)
def test_every_message_has_an_entry(place):
    possible = wrapped_messages() if place in WRAPPERS else [MESSAGES[place]]
    assert any(matches(entry, message) for entry in ENTRIES for message in possible), possible


def test_every_entry_says_what_it_means_and_what_to_do():
    assert ENTRIES
    assert len(ENTRIES) == len(set(ENTRIES))
    for row in ERROR_ROWS:
        assert len(row) == 3 and all(row), row
    for entry in ENTRIES:
        assert sum(len(part.split()) for part in entry.split(ELLIPSIS)) >= 2, entry
        # Else it would hide that a message has none of its own
        assert sum(matches(entry, message) for message in MESSAGES.values()) <= MAX_MESSAGES_OF_AN_ENTRY, entry


def expand(key: str) -> list[str]:
    """Keys that a row of a table stands for."""
    names = ["layers.3.self_attn.q_proj.weight", "embed_tokens.weight", "norm.weight"] if "NAME" in key else [""]
    if re.search(r"layers\.NAME\.", key):
        names = ["3.self_attn"]
    return [key.replace("NAME", name) for name in names]


@pytest.mark.parametrize(
    ("section", "patterns"),
    [("### The language model", authors.LANGUAGE_MODEL_KEYS), ("### The vision tower", authors.VISION_TOWER_KEYS)],
    ids=["language-model", "vision-tower"],
)
def test_keys_go_where_the_guide_says(section, patterns):
    rows = table(GUIDE.split(section + "\n")[1].split("\n### ")[0], "key", "goes to", "why")
    decided = set()
    for source, target, reason in rows:
        [source] = code(source)
        for key, expected in (
            zip(expand(source), expand(target), strict=True)
            if code(target)
            else [(key, None) for key in expand(source)]
        ):
            for stored in {key, key.removeprefix("vision_model.")}:
                if expected is None:
                    assert reason
                    assert rename_key(stored, patterns) is None, stored
                else:
                    assert rename_key(stored, patterns) == code(expected)[0], stored
                decided.add(next(pattern for pattern in patterns if re.fullmatch(pattern, stored)))
    assert decided == set(patterns), "the guide leaves out a pattern"


def test_projector_keys_are_the_codes():
    rows = table(GUIDE.split("### The projector\n")[1].split("is the separator")[0], "key", "goes to")
    assert {code(key)[0]: code(target)[0] for key, target in rows} == authors.PROJECTOR_KEYS
    assert f"`{authors.OUR_PROJECTOR_PREFIX}`" in GUIDE
    assert f"`{authors.IMAGE_NEWLINE_KEY}`" in GUIDE


def test_refused_keys_are_the_codes():
    rows = table(GUIDE, "keys such as", "belong to")
    assert {ablation for _, ablation in rows} == set(authors.UNSUPPORTED_KEYS.values())
    for keys, ablation in rows:
        for key in code(keys):
            [found] = [text for pattern, text in authors.UNSUPPORTED_KEYS.items() if re.fullmatch(pattern, key)]
            assert found == ablation, key


def test_prefixes_are_the_codes():
    rows = table(GUIDE, "layout", "in front of the projector's keys", "in front of the vision tower's keys")
    assert {layout: code(prefix) for layout, prefix, _ in rows} == {
        "LoRA release": [authors.LORA_PREFIX + authors.PROJECTOR_PREFIX],
        "full checkpoint": [authors.PROJECTOR_PREFIX],
        "pre-training output": [authors.PROJECTOR_PREFIX],
    }
    assert {layout: code(prefix) for layout, _, prefix in rows}["full checkpoint"] == [authors.TOWER_PREFIX]


def test_weight_files_are_the_codes():
    rows = table(GUIDE, "what you have", "its weights", "base model", "vision tower")
    assert {row[0]: tuple(code(row[1])) for row in rows} == {
        "LoRA release": (*authors.ADAPTER_WEIGHTS, authors.LORA_PROJECTOR_WEIGHTS),
        "full checkpoint": authors.MODEL_WEIGHTS,
        "pre-training output": authors.PRETRAINING_WEIGHTS,
    }


def config_cases() -> list:
    """A configuration that sets one field, for each value in the guide's table."""
    return [
        pytest.param(code(field)[0], value, result, id=f"{code(field)[0]}-{value.strip('`')}")
        for field, values, result, _ in table(GUIDE, "field", "value", "result", "how it is read")
        for value in re.findall(r"`[^`]+`|absent", values)
    ]


@pytest.mark.parametrize(("field", "value", "result"), config_cases())
def test_configuration_is_read_as_the_guide_says(field, value, result, tmp_path):
    config = {"image_aspect_ratio": "pad", "mm_vision_select_layer": -2, "mm_use_im_patch_token": False}
    if field == "image_grid_pinpoints" or "anyres" in value:
        # One of the three alone would be refused for the lack of the others
        config["image_aspect_ratio"], config["mm_patch_merge_type"] = "anyres", "spatial_unpad"
        config["image_grid_pinpoints"] = [[336, 672]]
    if value == "absent":
        config.pop(field, None)
    else:
        config[field] = json.loads(value.strip("`"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert result in ("converts", "refused")
    try:
        OriginalConfig.from_file(path)
    except ConversionError as error:
        assert result == "refused", error
        assert f"{field} is " in str(error)
    else:
        assert result == "converts"


def test_the_guide_names_all_fields_of_the_configuration():
    source = ast.parse(inspect.getsource(authors))
    fields = {
        node.args[0].value
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "config.get"
    }
    rows = table(GUIDE, "field", "value", "result", "how it is read")
    assert len(fields) >= 10
    assert {code(row[0])[0] for row in rows} == fields


def test_options_are_the_commands():
    rows = table(GUIDE, "option", "in Python", "what it does")
    named = {code(option)[0]: code(argument)[0] for option, argument, _ in rows}
    exist = {
        name: parameter.name
        for parameter in get_command(app).commands["convert"].params
        for name in [*parameter.opts, *parameter.secondary_opts]
        if name.startswith("--")
    }
    # The guide shows the form that changes something
    assert exist.pop("--verify") == "verify"
    assert named == exist
    arguments = set(inspect.signature(convert_checkpoint).parameters)
    assert set(named.values()) == arguments - {"checkpoint", "output"}
    assert arguments - set(inspect.signature(merge_adapter).parameters) == {
        "checkpoint",
        "vision_tower",
        "chat_template",
    }


def test_files_written_are_the_codes():
    names = [name for row in table(GUIDE, "file", "what it holds") for name in code(row[0])]
    assert {"config.json", "model.safetensors", "README.md"} <= set(names)
    assert all(CONVERTED_FILES.fullmatch(name) for name in names)
    assert f"a multiple of {VOCABULARY_MULTIPLE}," in " ".join(GUIDE.split())


def commands() -> list[list[str]]:
    """Every `llava-sp` command of the pages, in blocks and in sentences."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = [line for block in re.findall(r"^```\w+\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    sentences = re.findall(r"`(llava-sp [^`]+)`", text)
    return [shlex.split(line, comments=True) for line in [*blocks, *sentences] if line.startswith("llava-sp ")]


@pytest.mark.parametrize("command", commands(), ids=shlex.join)
def test_commands_exist(command):
    _, name, *arguments = command
    subcommand = get_command(app).commands[name]
    options = [argument for argument in arguments if argument.startswith("-")]
    assert set(options) <= {name for parameter in subcommand.params for name in parameter.opts}
    # In a sentence, a command may be named without its arguments
    if arguments:
        subcommand.make_context(name, list(arguments))


def test_commands_are_all_shown():
    shown = {(command[1], *(word for word in command if word.startswith("--"))) for command in commands()}
    assert {"convert", "merge", "inspect"} <= {command[0] for command in shown}
    assert ("inspect", "--json") in shown


def headings(path: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.is_file(), target
        assert not anchor or anchor in headings(path), target
