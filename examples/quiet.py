"""Importing this, before anything else, silences what the libraries say to their own developers."""

import logging
import os
import warnings

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # all files are here; nothing is to be looked up
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # speaks while peft imports it
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|peft|bitsandbytes)\b")

from transformers.utils import logging as transformers_logging  # noqa: E402 - after what it reads

transformers_logging.disable_progress_bar()
