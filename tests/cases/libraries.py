"""What the fork server of the tests loads once for all programs."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, and keeps them
