"""Text and images from files or Hugging Face datasets, cut into examples, in an order that depends on nothing but (seed, position)."""

from kanformer.training.data.columns import IMAGE, TEXT, VALUE, WORDS, Column
from kanformer.training.data.lines import read_lines
from kanformer.training.data.order import Order, Positions, Straight, micro_batches
from kanformer.training.data.packing import Packer, end_tokens, pack, tokenize, tokenize_streamed
from kanformer.training.data.padding import pad, pad_token
from kanformer.training.data.parts import file_columns, first_texts, load_held_out, load_texts, open_data, open_texts, text_examples
from kanformer.training.data.streams import Rows, Stream
from kanformer.training.data.tables import Table

__all__ = [
    "IMAGE",
    "TEXT",
    "VALUE",
    "WORDS",
    "Column",
    "Order",
    "Packer",
    "Positions",
    "Rows",
    "Stream",
    "Straight",
    "Table",
    "end_tokens",
    "file_columns",
    "first_texts",
    "load_held_out",
    "load_texts",
    "micro_batches",
    "open_data",
    "open_texts",
    "pack",
    "pad",
    "pad_token",
    "read_lines",
    "text_examples",
    "tokenize",
    "tokenize_streamed",
]
