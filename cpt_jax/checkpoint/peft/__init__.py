"""PEFT adapters, in and out: the directories that `peft.PeftModel.from_pretrained` reads and its `save_pretrained`
writes (peft, utils/save_and_load.py), LoRA and trained rows of the vocabulary."""

from cpt_jax.checkpoint.peft.load import Adapter, TrainedRows, load_adapter
from cpt_jax.checkpoint.peft.save import held_by_adapter, save_adapter

__all__ = ["Adapter", "TrainedRows", "held_by_adapter", "load_adapter", "save_adapter"]
