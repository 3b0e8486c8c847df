"""What the fork server of the tests loads once for all programs."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import madpo.graph
import madpo.practice.measuring
import madpo.practice.policy
import madpo.report  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, and keeps them
