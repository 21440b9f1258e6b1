"""The Auto classes know LLaVA-SP, whatever is imported first, and importing the package imports hardly anything."""

import subprocess
import sys

import pytest


USE = """
import sys
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
)
assert ("transformers_llava_sp.processing_llava_sp" in sys.modules) is {eager}
projector_config = AutoConfig.for_model("llava_sp_projector", vision_hidden_size=64, text_hidden_size=96, grid_size=12)
assert type(AutoModel.from_config(projector_config)).__name__ == "LlavaSPProjector"
tower = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
tower.update(image_size=96, patch_size=8)
text = dict(hidden_size=96, intermediate_size=96, num_attention_heads=2, num_hidden_layers=1, vocab_size=128)
config = AutoConfig.for_model(
    "llava_sp", vision_config=dict(model_type="clip_vision_model", **tower),
    text_config=dict(model_type="llama", **text), image_token_id=100,
)
for auto, name in (
    (AutoModel, "LlavaSPModel"),
    (AutoModelForImageTextToText, "LlavaSPForConditionalGeneration"),
    (AutoModelForMultimodalLM, "LlavaSPForConditionalGeneration"),
):
    assert type(auto.from_config(config)).__name__ == name, name
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
import transformers_llava_sp
assert PROCESSOR_MAPPING[type(config)] is transformers_llava_sp.LlavaSPProcessor
assert processor_class_from_name("LlavaSPProcessor") is transformers_llava_sp.LlavaSPProcessor
assert type(config) is transformers_llava_sp.LlavaSPConfig
"""


OTHER_FINDER = """
import sys
from importlib.machinery import PathFinder

class Finder:
    asked = []

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.startswith("transformers.models.auto"):
            cls.asked.append(name)
            return PathFinder.find_spec(name, path, target)

sys.meta_path.insert(0, Finder)
import transformers_llava_sp
from transformers import AutoModel
assert "transformers.models.auto.modeling_auto" in Finder.asked
"""


def run(code: str) -> None:
    """Run Python in a process of its own, where nothing has been imported."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("first", "eager"),
    [
        ("import transformers_llava_sp", False),
        ("import transformers, transformers_llava_sp", False),
        ("from transformers import AutoConfig; import transformers_llava_sp", True),
        ("from transformers import pipeline; import transformers_llava_sp", True),
        # Imports the tables of models while it is itself half imported
        ("import transformers_llava_sp; from transformers import GenerationMixin", False),
        ("from transformers_llava_sp.configuration_llava_sp import LlavaSPConfig", False),
        ("from transformers_llava_sp import LlavaSPForConditionalGeneration", False),
        # Another finder that supplies Transformers' modules
        (OTHER_FINDER, False),
    ],
)
def test_auto_classes_know_the_models_whatever_is_imported_first(first: str, eager: bool) -> None:
    run(f"{first}\n{USE.format(eager=eager)}")


def test_importing_the_package_imports_neither_pytorch_nor_transformers() -> None:
    run(
        "import sys, transformers_llava_sp\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        "assert {'LlavaSPConfig', 'LlavaSPProcessor', 'modeling_llava_sp'} <= set(dir(transformers_llava_sp))\n"
    )


def test_every_public_name_can_be_had() -> None:
    run("import sys\nfrom transformers_llava_sp import *\nimport transformers_llava_sp as package\n"
        "assert all(name in globals() for name in package.__all__)")  # fmt: skip


def test_serving_finds_the_model_in_the_tables() -> None:
    for first in ("", "from transformers import AutoModel"):
        run(
            f"{first}\n"
            "import transformers_llava_sp\n"
            "from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as names\n"
            "assert names['llava_sp'] == 'LlavaSPForConditionalGeneration'\n"
        )


def test_the_models_code_is_imported_once() -> None:
    run(
        "import importlib, transformers_llava_sp\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.for_model('llava_sp')\n"
        "assert type(config).__module__ == 'transformers_llava_sp.configuration_llava_sp'\n"
        "for name in ('llava_sp.modeling_llava_sp', 'transformers_llava_sp.modeling_llava_sp'):\n"
        "    try:\n"
        "        importlib.import_module(f'transformers.models.{name}')\n"
        "    except ModuleNotFoundError:\n"
        "        continue\n"
        "    raise AssertionError(name)\n"
    )


def test_a_table_that_is_gone_is_named() -> None:
    from types import ModuleType

    from transformers_llava_sp.registration import add_names

    with pytest.raises(ImportError, match="modeling_auto has no MODEL_MAPPING_NAMES, where LLaVA-SP registers itself"):
        add_names(ModuleType("transformers.models.auto.modeling_auto"))


def test_an_unknown_name_is_no_attribute() -> None:
    import transformers_llava_sp

    with pytest.raises(AttributeError, match="has no attribute 'LlavaSPModell'"):
        _ = transformers_llava_sp.LlavaSPModell


def test_importing_the_package_again_adds_no_second_finder() -> None:
    run(
        "import sys, importlib, transformers_llava_sp\n"
        "importlib.reload(transformers_llava_sp)\n"
        "assert [type(finder).__name__ for finder in sys.meta_path].count('NameAdder') == 1\n"
        "from transformers import AutoConfig\n"
        "assert AutoConfig.for_model('llava_sp').model_type == 'llava_sp'\n"
    )
