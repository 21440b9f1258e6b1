"""
Fine-tune LLaVA-SP with LoRA on conversations, with Transformers' Trainer and PEFT alone: a script to change.
`llava-sp train lora` does the same with more care, such as a learning rate of its own for the projector.

    python examples/finetune_lora.py llava-sp-cropping-7b conversations.json images adapter

The adapter in the last folder holds LoRA and the projector:

    llava-sp merge adapter my-llava-sp
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import transformers_llava_sp  # noqa: F401  # registers LLaVA-SP with Transformers
from transformers_llava_sp.training import LlavaSPDataCollator, drop_long_records, load_conversations


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a converted LLaVA-SP model: a folder or a Hub id")
parser.add_argument("conversations", help="LLaVA's JSON, or a data set with messages and images")
parser.add_argument("images", help="the folder that its images' paths are relative to")
parser.add_argument("output", help="the folder to write")
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--rank", type=int, default=128)
arguments = parser.parse_args()

processor = AutoProcessor.from_pretrained(arguments.model)
collator = LlavaSPDataCollator(processor, max_length=2048)
dataset = drop_long_records(load_conversations(arguments.conversations, arguments.images), collator)

on_gpu = torch.cuda.is_available()
model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
# The vision tower has layers of the same names, hence the beginning of the pattern. `modules_to_save` trains the
# projector in full and keeps a copy of it.
config = LoraConfig(
    task_type="CAUSAL_LM",
    r=arguments.rank,
    lora_alpha=2 * arguments.rank,
    lora_dropout=0.05,
    target_modules=r".*\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    modules_to_save=["multi_modal_projector"],
)
model = get_peft_model(model, config)
model.base_model.model.model.multi_modal_projector.float()  # bfloat16 would round small steps away
model.print_trainable_parameters()

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=arguments.output,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=2e-5,  # the projector's: recipes/lora.yaml has ten times as much for LoRA
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        bf16=on_gpu,
        logging_steps=1,
        remove_unused_columns=False,  # the collator needs what Trainer would remove
        report_to="none",
    ),
    data_collator=collator,
    train_dataset=dataset,
    processing_class=processor,
)
trainer.train()
trainer.save_model()
