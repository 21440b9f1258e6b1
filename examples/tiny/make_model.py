"""
The model that the tiny ones are trained from: a trained vision tower, and a projector and language model with random
weights.

    python examples/tiny/make_model.py TOWER MODEL --spatial-variant cropping
"""

import argparse
import tempfile
from pathlib import Path

import scenes
import torch
from evaluate import training_questions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from transformers_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProcessor


# Without a system prompt, and with marks around the answers, by which training finds what to learn
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}{{ '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only the roles user and assistant are known, not ' ~ message['role']) }}{% endif %}"
    "{% endfor %}"
)
VOCABULARY_SIZE = 400
CONTEXT = 512  # tokens
SPATIAL_HIDDEN_SIZE = 24


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def make_language_model(folder: Path, hidden_size: int = 96, num_layers: int = 4, seed: int = 0) -> None:
    """Write a language model with random weights, and its tokenizer."""
    set_seed(seed)
    questions = training_questions(5_000)
    tokenizer = make_tokenizer([text for question in questions for text in (question.text, question.answer)])
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        # The usual 0.02 is meant for widths of thousands: from there a narrow model learns more slowly
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tower", type=Path, help="what train_tower.py has written")
    parser.add_argument("output", type=Path, help="the folder to write the model to")
    parser.add_argument("--spatial-variant", default="cropping", choices=("cropping", "pooling"))
    parser.add_argument("--hidden-size", type=int, default=96, help="the language model's width")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        parts = arguments.tower, Path(folder)
        make_language_model(parts[1], arguments.hidden_size, arguments.layers, arguments.seed)
        model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(
            *parts,
            spatial_variant=arguments.spatial_variant,
            spatial_hidden_size=SPATIAL_HIDDEN_SIZE,
            dtype=torch.float32,
        )
        model.save_pretrained(arguments.output)
        LlavaSPProcessor.from_vision_text_pretrained(*parts, model.config).save_pretrained(arguments.output)
    print(f"{arguments.output} has {model.num_parameters():,} parameters, for images of {scenes.SIZE} pixels.")


if __name__ == "__main__":
    main()
