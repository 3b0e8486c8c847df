"""What the fork server of the tests loads once for all programs, without garbage collections until one begins."""
# ruff: noqa: E402, F401

import gc

gc.disable()

import transformers.models.gemma3.modeling_gemma3
import transformers.models.llama.modeling_llama
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import madpo.operations.evaluation
import madpo.operations.policy
import madpo.report
import madpo.study.graph

get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, and keeps them
