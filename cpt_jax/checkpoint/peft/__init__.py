"""PEFT adapters, in and out: the directories that `peft.PeftModel.from_pretrained` reads and its `save_pretrained`
writes (peft, utils/save_and_load.py), LoRA and trained rows of the vocabulary."""

from cpt_jax.checkpoint.peft.load import Adapter, TrainedRows, load_adapter
from cpt_jax.checkpoint.peft.save import save_adapter

__all__ = ["Adapter", "TrainedRows", "load_adapter", "save_adapter"]
