"""What options of other tools are called here; none of them is taken in silence.

The left side is an option or a command as people know it, in lower case with dashes. An option that has no counterpart
says so. The settings named on the right are tested to compose.
"""

BASE_MODEL = "model=smollm2_135m, or model=hub model.hub_id=OWNER/NAME; for fedllm init --model"
METHOD = "method=fedlora, fedprompt, fedresprompt or fedgrass; for fedllm init --method"
TIERS = "cascade.tiers=[...] with action=cascade, calibrate, query or serve (docs/cascades.md)"
SPARSE = "method=fedgrass strategy=row_mean client.clip_norm=0 trains few rows; wire=top_k or flasc sends few values"
FAIR = "fairness=group_dro, bounded_loss, accuracy_gap, agnostic or q_ffl, and fairness.groups=data or label"
BATCH = "serving.max_batch and serving.max_wait_seconds with action=serve (docs/serving.md)"
FORGET = "action=unlearn run=DIR client=N, of a run with unlearning=ledger or shards (docs/unlearning.md)"
VERIFY = "the certificate that action=unlearn writes; attacks are functions (docs/unlearning.md)"
NOT_HERE = "nothing: it is not supported"

ELSEWHERE: dict[str, str] = {
    "train-llm": "fedllm experiment=NAME",
    "train": "fedllm experiment=NAME",
    "deploy-llm": "fedllm deploy; or action=serve to answer queries",
    "infer": "action=serve, or action=query for a cascade",
    "base-model": BASE_MODEL,
    "device-model": "the first of cascade.tiers",
    "models": TIERS,
    "training-method": METHOD,
    "adapter": "method=fedlora",
    "lora-rank": "method.rank=16",
    "rank": "method.rank=16",
    "lora-alpha": "method.alpha=32",
    "rounds": "num_rounds=20",
    "num-rounds": "num_rounds=20",
    "num-clients": "partition.num_clients=8",
    "local-epochs": "client.local_epochs=1",
    "batch-size": "client.batch_size=32 in training, serving.max_batch in action=serve",
    "cascade": TIERS,
    "cascade-models": TIERS,
    "cascade-strategy": TIERS,
    "cascade-enabled": TIERS,
    "agreement-samples": "samples of a tier in cascade.tiers",
    "agreement-threshold": "cascade.thetas=[0.8]",
    "semantic-threshold": "no setting: semantic agreement is a function (docs/cascades.md)",
    "similarity-model": "no setting: semantic agreement is a function (docs/cascades.md)",
    "task-type": "nothing: the task decides it (task=csv with a prompt and a response column writes text)",
    "sparse-gradients": SPARSE,
    "sparsity": SPARSE,
    "target-sparsity": "wire.top_k_fraction=0.1 of wire=top_k, or method.rank of method=fedgrass",
    "sparsity-structure": "nothing: method=fedgrass always trains whole rows",
    "error-feedback": "wire.error_feedback=true of wire=top_k",
    "fairness": FAIR,
    "fairness-constraint": FAIR,
    "max-group-disparity": "fairness=accuracy_gap fairness.max_gap=0.1",
    "groups": "fairness.groups=data, label, client, inferred or random",
    "prompting": FAIR,
    "group-aware-prompts": FAIR,
    "batching": BATCH,
    "batch-queries": BATCH,
    "query-batching": BATCH,
    "batch-timeout": "serving.max_wait_seconds=0.1",
    "parallel-strategy": "nothing: requests that wait are answered in one pass (docs/serving.md)",
    "prompt-tuning": "method=fedprompt strategy=prompt_mean",
    "learn-prompts": "method=fedprompt strategy=prompt_mean",
    "train-prompts": "method=fedprompt strategy=prompt_mean",
    "prompt-length": "method.length=20",
    "prompt-initialization": "method.start=random or text",
    "prompt-aggregation": "strategy=prompt_mean",
    "personalized-prompts": "method.personal_length=10",
    "personal-prompt-length": "method.personal_length=10",
    "shared-prompt-length": "method.length=10",
    "privacy": "privacy=central, local or sample (docs/privacy.md)",
    "epsilon": "privacy.epsilon_budget (docs/privacy.md)",
    "unlearning-enabled": "unlearning=ledger or shards",
    "request-unlearning": FORGET,
    "unlearning-method": FORGET,
    "verify-unlearning": VERIFY,
    "unlearning-verification": VERIFY,
    "verification-budget": VERIFY,
    "fallback-to-retrain": "nothing: method=retrain of action=unlearn is asked for by name",
    "project-id": NOT_HERE + "; a run is its directory",
}


def counterpart(word: str) -> str:
    """How an option of another tool is written here.

    Args:
        word: As it was typed: ``--cascade-models=a,b``, ``cascade_models`` or a command.

    Returns:
        A sentence to put behind an error; empty for a word that nobody knows.
    """
    name = word.lstrip("-").partition("=")[0].replace("_", "-").lower()
    return f"; here it is {ELSEWHERE[name]}" if name in ELSEWHERE else ""
