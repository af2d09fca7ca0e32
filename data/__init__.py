"""Prompts, target-generated pseudo-data, the teacher store and batches; each module's docstring says what it offers.

- data.prompts      load_prompts: any source of prompts or conversations -> list[Prompt]
- data.pseudo_data  write_pseudo_data, read_pseudo_data: text written by the target
- data.store        write_store, open_store: the target's top-k logits and hidden layers, stored once
- data.teacher      complete: the same, computed live
- data.batches      Example, Batch, collate, split, batches: what trainers see
- data.examples     open_examples: any of the folders above, or a source of text, as examples for training
"""

from pathlib import Path

POCKET = Path(__file__).resolve().parent / "pocket"
POCKET_SEQ2SEQ = POCKET.with_name("pocket-seq2seq")
