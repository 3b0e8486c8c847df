# ruff: noqa: E501
"""Rows of public preference data with their real columns and invented texts, and the pair that each should give."""

import json
from typing import Any, NamedTuple

ASK, GOOD, BAD = "Name a river.", "The Po.", "Italy."
NEXT = "And one more?"


def user(text: str = ASK) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def human(text: str = ASK) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


TEXT = (ASK, GOOD, BAD)
CHAT = ([user()], [bot(GOOD)], [bot(BAD)])
TURNS = ([user("Hi"), bot("Hello!"), user()], [bot(GOOD)], [bot(BAD)])
BRIEF = {"role": "system", "content": "Be brief."}


class Case(NamedTuple):
    """Rows of a layout, the (prompt, chosen, rejected) of its pairs, and what else is found.

    Attributes:
        margin: the candidate for reward_margin: its name and its mean.
        left_out: kind of finding -> rows.
        flat: CSV can hold it.
    """

    rows: list[dict[str, Any]]
    pairs: list[tuple[Any, Any, Any]]
    margin: tuple[str, float] | None = None
    left_out: dict[str, int] = {}  # noqa: RUF012 a tuple's field
    flat: bool = False


def one(row: dict[str, Any], pair: tuple[Any, Any, Any], **more: Any) -> Case:
    return Case([row], [pair], **more)


SCORES = "chosen_score - rejected_score"
WHOLE = {"chosen": [user(), bot(GOOD)], "rejected": [user(), bot(BAD)]}
SIDES = {"chosen": GOOD, "rejected": BAD}
FLAT = {"prompt": ASK, **SIDES}
HUMAN = "\n\nHuman: Name a river.\n\nAssistant:"

CASES: dict[str, Case] = {
    "Anthropic/hh-rlhf": one(
        {"chosen": f"{HUMAN} It is the Po.", "rejected": f"{HUMAN} It is Italy."},
        (HUMAN, " It is the Po.", " It is Italy."),
        flat=True,
    ),
    "PKU-Alignment/processed-hh-rlhf": one(
        {
            "context": [{"role": "human", "text": ASK}],
            "chosen": {"role": "assistant", "text": GOOD},
            "rejected": {"role": "assistant", "text": BAD},
        },
        CHAT,
    ),
    "HuggingFaceH4/ultrafeedback_binarized": one(
        WHOLE | {"prompt": ASK, "prompt_id": "f", "messages": WHOLE["chosen"], "score_chosen": 8.5, "score_rejected": 4.0},
        CHAT,
        margin=(SCORES, 4.5),
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": one(
        WHOLE | {"source": "s", "prompt": ASK, "chosen-rating": 5.0, "chosen-model": "m", "rejected-rating": 3.75},
        CHAT,
        margin=(SCORES, 1.25),
    ),
    "argilla/ultrafeedback-binarized-preferences": one(
        {"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD, "chosen_avg_rating": 4.75,
         "rejected_avg_rating": 2.0, "chosen_model": "gpt-4"},
        TEXT,
        margin=(SCORES, 2.75),
        flat=True,
    ),
    "Intel/orca_dpo_pairs": one(SIDES | {"system": "Be brief.", "question": ASK}, (f"Be brief.\n\n{ASK}", GOOD, BAD), flat=True),
    "argilla/distilabel-intel-orca-dpo-pairs": one(
        SIDES | {"system": "", "input": ASK, "generations": [GOOD, BAD], "order": ["chosen", "rejected"],
                 "rating": [9.0, 7.0], "status": "unchanged", "chosen_score": 9.0, "original_chosen": GOOD},
        TEXT,
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": one(
        {"conversation": [{"input": "Hi", "output": "Hello!"}, {"input": ASK, "output": GOOD}],
         "prompt": f"Hi Hello! {ASK}", "chosen": [*TURNS[0], bot(GOOD)], "rejected": [*TURNS[0], bot(BAD)],
         "rating_chosen": 5, "rating_rejected": 2},
        TURNS,
        margin=(SCORES, 3.0),
    ),
    "argilla/dpo-mix-7k": one(WHOLE | {"dataset": "d", "chosen_rating": 5.0, "rejected_rating": 2.0}, CHAT, margin=(SCORES, 3.0)),
    "nvidia/HelpSteer2 preference": Case(
        [
            {"split": "train", "prompt": ASK, "response_1": one, "response_2": two, "preference_strength": s,
             "preference_statement": "x", "all_preferences_unprocessed": [{"strength": s}]}
            for one, two, s in ((GOOD, BAD, -2), (BAD, GOOD, 3), (GOOD, BAD, 0))
        ],
        [TEXT, TEXT],
        margin=("preference_strength", 2.5),
        left_out={"tie": 1},
    ),
    "nvidia/HelpSteer2": Case(
        [
            {"prompt": ASK, "response": text, "helpfulness": h, "correctness": 4, "coherence": 4, "verbosity": 2}
            for text, h in ((BAD, 1), (GOOD, 4))
        ]
        + [{"prompt": NEXT, "response": GOOD, "helpfulness": 3, "correctness": 4, "coherence": 4, "verbosity": 2}],
        [TEXT],
        margin=(SCORES, 3.0),
        left_out={"unpaired": 1},
        flat=True,
    ),
    "nvidia/HelpSteer3": Case(
        [
            {"domain": "general", "language": "english", "context": [user()], "response1": one, "response2": two,
             "overall_preference": s, "individual_preference": [{"score": s}]}
            for one, two, s in ((GOOD, BAD, -1), (BAD, GOOD, 2), (GOOD, BAD, 0))
        ],
        [CHAT, CHAT],
        margin=("overall_preference", 1.5),
        left_out={"tie": 1},
    ),
    "berkeley-nest/Nectar": one(
        {"prompt": f"{HUMAN} ", "answers": [{"answer": text, "model": "m", "rank": r} for text, r in ((BAD, 7.0), (GOOD, 1.0), ("Hm.", 3.0))],
         "turns": 1, "num_responses": 3, "source": ["s"], "good_natured": True},
        (f"{HUMAN} ", GOOD, BAD),
        margin=("rank", 6.0),
    ),
    "openbmb/UltraFeedback": one(
        {"source": "s", "instruction": ASK, "models": ["a", "b"], "correct_answers": ["None"],
         "completions": [
             {"model": "m", "custom_system_prompt": "Be brief.", "response": text, "overall_score": s, "critique": "c",
              "fine-grained_score": 1.0, "annotations": {"honesty": {"Rating": "2", "Rationale": "x"}}}
             for text, s in ((BAD, 3.0), (GOOD, 9.0))
         ]},
        (f"Be brief.\n\n{ASK}", GOOD, BAD),
        margin=(SCORES, 6.0),
    ),
    "lmarena-ai/arena-human-preference-55k": Case(
        [
            {"id": 0, "model_a": "m", "model_b": "n", "prompt": json.dumps([ASK]), "response_a": json.dumps([one]),
             "response_b": json.dumps([two]), "winner_model_a": a, "winner_model_b": b, "winner_tie": 1 - a - b}
            for one, two, a, b in ((GOOD, BAD, 1, 0), (BAD, GOOD, 0, 1), (GOOD, BAD, 0, 0))
        ]
        + [
            {"id": 3, "model_a": "m", "model_b": "n", "prompt": json.dumps(["Hi", ASK]),
             "response_a": json.dumps(["Hello!", GOOD]), "response_b": json.dumps(["Hello!", BAD]),
             "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
            {"id": 4, "model_a": "m", "model_b": "n", "prompt": json.dumps([ASK]), "response_a": "[null]",
             "response_b": json.dumps([BAD]), "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        ],
        [CHAT, CHAT, TURNS],
        left_out={"tie": 1, "no_completion": 1},
        flat=True,
    ),
    "lmsys/chatbot_arena_conversations": Case(
        [
            {"question_id": "0", "model_a": "m", "model_b": "n", "winner": w, "judge": "j", "turn": 1, "anony": True,
             "conversation_a": [user(), bot(one)], "conversation_b": [user(), bot(two)], "language": "English",
             "openai_moderation": {"flagged": False}}
            for one, two, w in ((GOOD, BAD, "model_a"), (BAD, GOOD, "model_b"), (GOOD, BAD, "tie (bothbad)"), (GOOD, BAD, "tie"))
        ],
        [CHAT, CHAT],
        left_out={"tie": 2},
    ),
    "lmarena-ai/arena-human-preference-140k": Case(
        [
            {"id": "0", "model_a": "m", "model_b": "n", "winner": w, "evaluation_order": 1, "language": "en",
             **{f"conversation_{s}": [{"role": r, "content": [{"type": "text", "text": t, "image": None, "mimeType": None}]}
                                      for r, t in (("user", ASK), ("assistant", c))] for s, c in (("a", BAD), ("b", GOOD))}}
            for w in ("model_b", "both_bad")
        ],
        [CHAT],
        left_out={"tie": 1},
    ),
    "lmsys/mt_bench_human_judgments": one(
        {"question_id": 81, "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "author_2",
         "conversation_a": [user(), bot(BAD)], "conversation_b": [user(), bot(GOOD)], "turn": 1},
        CHAT,
    ),
    "lmarena-ai/PPE-Human-Preference-V1": Case(
        [
            {"question_id": "q", "model_1": "m", "model_2": "n", "winner": w, "hard_prompt": True, "prompt": ASK,
             "response_1": one, "response_2": two, "language": "English"}
            for one, two, w in ((GOOD, BAD, "model_1"), (BAD, GOOD, "model_2"), (BAD, GOOD, "tie (bothbad)"))
        ],
        [TEXT, TEXT],
        left_out={"tie": 1},
        flat=True,
    ),
    "PKU-Alignment/PKU-SafeRLHF": Case(
        [
            {"prompt": ASK, "response_0": one, "response_1": two, "prompt_source": "p", "response_0_source": "m",
             "is_response_0_safe": True, "is_response_1_safe": True, "better_response_id": b, "safer_response_id": s}
            for one, two, b, s in ((GOOD, BAD, 0, 1), (BAD, GOOD, 1, 1))
        ],
        [TEXT, TEXT],
        flat=True,
    ),
    "stanfordnlp/SHP": Case(
        [
            {"post_id": "p", "domain": "askculinary", "history": ASK, "human_ref_A": one, "human_ref_B": two, "labels": label,
             "score_A": a, "score_B": b, "score_ratio": 2.0, "c_root_id_A": "x"}
            for one, two, label, a, b in ((GOOD, BAD, 1, 6, 3), (BAD, GOOD, 0, 2, 7))
        ],
        [TEXT, TEXT],
        margin=("score_A - score_B", 4.0),
        flat=True,
    ),
    "openai/webgpt_comparisons": Case(
        [
            {"question": {"dataset": "eli5", "id": "i", "full_text": ASK}, "quotes_0": {"title": ["t"]}, "answer_0": one,
             "tokens_0": {"prefix": [1]}, "score_0": s, "quotes_1": {"title": ["t"]}, "answer_1": two, "score_1": -s}
            for one, two, s in ((GOOD, BAD, 0.5), (BAD, GOOD, -0.25), (GOOD, BAD, 0.0))
        ],
        [TEXT, TEXT],
        margin=(SCORES, 0.75),
        left_out={"unranked": 1},
    ),
    "openai/summarize_from_feedback": one(
        {"info": {"id": "i", "post": ASK, "title": "t", "subreddit": "r", "article": None},
         "summaries": [{"text": BAD, "policy": "p", "note": None}, {"text": GOOD, "policy": "q", "note": None}],
         "choice": 1, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 3}},
        TEXT,
    ),
    "openai/lm-human-preferences": one(
        {"query": ASK, "sample0": BAD, "sample1": BAD, "sample2": GOOD, "sample3": BAD, "best": 2}, TEXT, flat=True
    ),
    "tatsu-lab/alpaca_farm": Case(
        [
            {"instruction": ASK, "input": "", "output_1": one, "output_2": two, "preference": p, "raw_preference": 3}
            for one, two, p in ((GOOD, BAD, 1), (BAD, GOOD, 2))
        ],
        [TEXT, TEXT],
        flat=True,
    ),
    "tatsu-lab/alpaca_eval": Case(
        [
            {"instruction": ASK, "output_1": one, "generator_1": "m", "output_2": two, "generator_2": "n", "annotator": "a",
             "preference": p}
            for one, two, p in ((GOOD, BAD, 1.02), (BAD, GOOD, 1.97), (BAD, GOOD, 1.5))
        ],
        [TEXT, TEXT],
        left_out={"tie": 1},
        flat=True,
    ),
    "NCSOFT/offsetbias": one({"instruction": ASK, "output_1": BAD, "output_2": GOOD, "label": 2, "bias": "b"}, TEXT, flat=True),
    "princeton-nlp/LLMBar": one({"input": ASK, "output_1": GOOD, "output_2": BAD, "label": 1}, TEXT, flat=True),
    "ScalerLab/JudgeBench": Case(
        [
            {"pair_id": i, "original_id": "o", "source": "s", "question": ASK, "response_model": "m", "response_A": one,
             "response_B": two, "label": label}
            for i, (one, two, label) in enumerate(((GOOD, BAD, "A>B"), (BAD, GOOD, "B>A"), (GOOD, BAD, "A=B")))
        ],
        [TEXT, TEXT],
        left_out={"tie": 1},
        flat=True,
    ),
    "prometheus-eval/Preference-Collection": one(
        {"instruction": f"###Task: judge {ASK}", "orig_instruction": ASK, "orig_response_A": BAD, "orig_response_B": GOOD,
         "orig_score_A": "2", "orig_score_B": "5", "orig_preference": "B", "output": "so B", "input": "", "orig_criteria": "c",
         "orig_feedback_A": "f"},
        TEXT,
        flat=True,
    ),
    "HuggingFaceH4/stack-exchange-preferences": one(
        {"qid": 1, "question": ASK, "date": "2020", "metadata": ["u"],
         "answers": [{"answer_id": i, "author": "a", "pm_score": s, "selected": False, "text": t}
                     for i, (t, s) in enumerate(((BAD, 0), (GOOD, 4)))]},
        TEXT,
        margin=(SCORES, 4.0),
    ),
    "lvwerra/stack-exchange-paired": one(
        {"qid": 0, "question": ASK, "date": "2020", "metadata": "u", "response_j": GOOD, "response_k": BAD}, TEXT, flat=True
    ),
    "HuggingFaceH4/hhh_alignment": one({"input": ASK, "targets": {"choices": [BAD, GOOD], "labels": [0, 1]}}, TEXT, margin=(SCORES, 1.0)),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": Case(
        [WHOLE | {"id": "x", "source": "s", "prompt": p, "chosen_model": "m", "rejected_model": "n"} for p in (ASK, None)],
        [CHAT, CHAT],
    ),
    "Skywork/Skywork-Reward-Preference-80K": one(WHOLE | {"source": "s"}, CHAT),
    "allenai/reward-bench": one(FLAT | {"chosen_model": "m", "rejected_model": "n", "subset": "s", "id": 1}, TEXT, flat=True),
    "OpenAssistant/oasst2 trees": one(
        {"message_tree_id": "t", "tree_state": "ready_for_export",
         "prompt": {"message_id": "m", "parent_id": None, "text": "Hi", "role": "prompter", "lang": "en", "replies": [
             {"message_id": "r", "text": "Hello!", "role": "assistant", "rank": 0, "replies": [
                 {"message_id": "u", "text": ASK, "role": "prompter", "rank": 0, "replies": [
                     {"message_id": "a", "text": BAD, "role": "assistant", "rank": 2, "replies": []},
                     {"message_id": "b", "text": GOOD, "role": "assistant", "rank": 0, "replies": []},
                     {"message_id": "c", "text": "?", "role": "assistant", "rank": None, "replies": []}]}]}]}},
        TURNS,
        margin=("rank", 2.0),
    ),
    "LLaMA-Factory alpaca": one(SIDES | {"instruction": "Answer.", "input": ASK}, (f"Answer.\n{ASK}", GOOD, BAD), flat=True),
    "LLaMA-Factory alpaca, system and history": one(
        SIDES | {"instruction": ASK, "input": "", "system": "Be brief.", "history": [["Hi", "Hello!"]]},
        ([BRIEF, *TURNS[0]], [bot(GOOD)], [bot(BAD)]),
    ),
    "LLaMA-Factory output": one({"instruction": ASK, "input": "", "output": [GOOD, BAD]}, TEXT),
    "LLaMA-Factory sharegpt": one(
        {"conversations": [human("Hi"), gpt("Hello!"), human()], "system": "Be brief.", "tools": "", "chosen": gpt(GOOD),
         "rejected": gpt(BAD)},
        ([BRIEF, *TURNS[0]], [bot(GOOD)], [bot(BAD)]),
    ),
    "LLaMA-Factory kto": Case(
        [{"instruction": ASK, "input": "", "output": text, "kto_tag": tag} for text, tag in ((GOOD, True), (BAD, False))],
        [TEXT],
        flat=True,
    ),
    "axolotl chatml.intel": one(SIDES | {"system": "Be brief.", "question": ASK}, (f"Be brief.\n\n{ASK}", GOOD, BAD), flat=True),
    "axolotl chatml.argilla": one(
        {"system": "Be brief.", "instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD},
        (f"Be brief.\n\n{ASK}", GOOD, BAD),
        flat=True,
    ),
    "axolotl chatml.icr": one(SIDES | {"system": "", "input": ASK}, TEXT, flat=True),
    "axolotl chatml.ultra": one(WHOLE | {"system": "Be brief.", "prompt": ASK}, ([BRIEF, user()], [bot(GOOD)], [bot(BAD)])),
    "axolotl chat_template.default": one(
        {"messages": TURNS[0], "chosen": bot(GOOD), "rejected": bot(BAD)}, TURNS
    ),
    "OpenAI preference fine-tuning": one(
        {"input": {"messages": [user()], "tools": [], "parallel_tool_calls": True}, "preferred_output": [bot(GOOD)],
         "non_preferred_output": [bot(BAD)]},
        CHAT,
    ),
    "NVIDIA NeMo-RL": one(
        {"context": [user()], "completions": [{"rank": r, "completion": [bot(t)]} for r, t in ((1, BAD), (0, GOOD))]},
        CHAT,
        margin=("rank", 1.0),
    ),
    "torchtune": one(
        {"chosen_conversations": [human(), gpt(GOOD)], "rejected_conversations": [human(), gpt(BAD)]}, CHAT
    ),
    "ms-swift": one({"messages": [*TURNS[0], bot(GOOD)], "rejected_response": BAD}, TURNS),
    "ms-swift rejected_messages": one(
        {"messages": [*TURNS[0], bot(GOOD)], "rejected_messages": [*TURNS[0], bot(BAD)]}, TURNS
    ),
    "ms-swift 2": one(
        {"system": "Be brief.", "query": ASK, "response": GOOD, "rejected_response": BAD, "history": [["Hi", "Hello!"]]},
        ([BRIEF, *TURNS[0]], [bot(GOOD)], [bot(BAD)]),
    ),
    "ms-swift kto": Case(
        [{"messages": [user(), bot(text)], "label": good} for text, good in ((BAD, False), (GOOD, True))], [CHAT]
    ),
    "trl-lib/kto-mix-14k": Case(
        [
            {"prompt": [user(p)], "completion": [bot(text)], "label": good}
            for p, text, good in ((ASK, BAD, False), (NEXT, GOOD, True), (ASK, GOOD, True))
        ],
        [CHAT],
        left_out={"unpaired": 1},
    ),
    "PKU-Alignment/BeaverTails": Case(
        [
            {"prompt": ASK, "response": text, "category": {"violence": not safe}, "is_safe": safe}
            for text, safe in ((GOOD, True), (BAD, False))
        ],
        [TEXT],
    ),
    "argilla/OpenHermesPreferences": one(
        WHOLE | {"source": "s", "prompt": ASK, "candidates_completions": [GOOD, BAD], "ranks": [1, 2], "rank_str": "a>b",
                 "chosen_policy": "a", "rejected_policy": "b"},
        CHAT,
    ),
    "princeton-nlp/llama3-ultrafeedback-armorm": one(
        WHOLE | {"prompt_id": "i", "prompt": ASK, "all_generated_responses": [GOOD, BAD], "all_rm_scores": [0.2, 0.1]}, CHAT
    ),
    "Vezora/Code-Preference-Pairs": one({"input": ASK, "accepted": GOOD, "rejected": BAD, "ID": 1}, TEXT, flat=True),
    "openbmb/UltraInteract_pair": one(
        {"task": "Coding", "dataset": "d", "trajectory": [{"from": "user", "value": ASK}], "chosen": GOOD, "rejected": BAD,
         "id": "i"},
        CHAT,
    ),
    "mlabonne/orpo-dpo-mix-40k": one(WHOLE | {"source": "s", "prompt": ASK, "question": ASK}, CHAT),
    "CarperAI/openai_summarize_comparisons": one(FLAT, TEXT, flat=True),
}  # fmt: skip
