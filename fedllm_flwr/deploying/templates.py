"""The texts of a new project folder, and its example rows."""

import csv
import io
from string import Template

PYPROJECT = Template("""\
[project]
name = "$name"
version = "0.1.0"
description = "Federated adaptation of a language model ($method on $model)"
license = { text = "see README.md" }
dependencies = ["fedllm-flwr==$version"]

# This table makes the folder a project: typed here, `fedllm` finds the experiments in conf/ too.
[tool.fedllm]

[tool.flwr.app]
publisher = "your-organisation"
# What Flower sends to the nodes: code and configuration, never data, keys or results.
fab-include = ["/server.py", "/client.py", "/conf/**/*.yaml", "/README.md"]

[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"

[tool.flwr.app.config]
experiment = "$name"
overrides = ""
""")

SERVER = '''\
"""The server's door: fedllm's, with the experiments of this folder."""

from pathlib import Path

from fedllm_flwr.server_app import make_app

app = make_app(Path(__file__).resolve().parent)
'''

CLIENT = '''\
"""The nodes' door: fedllm's own."""

from fedllm_flwr.client_app import app

__all__ = ["app"]
'''

IGNORED = """\
outputs/
__pycache__/
*.crt
*.key
*.pem
/node
"""

EXPERIMENT = Template("""\
# @package _global_
# Question: $question
# Minutes on two cores: 2.
# Run:  fedllm experiment=$name
defaults:
  - override /model: $model_leaf
  - override /task: $task
  - override /partition: $partition
  - override /method: $method
  - override /strategy: $strategy
  - override /baselines: $baselines
  - override /runtime: loopback
experiment: $name
num_rounds: 3
$settings""")

SETTINGS = {
    "fedlora": """\
task:
  labels: [account, delivery, invoice]  # all of them, in one order: a site's file may lack some
  max_tokens: 96
partition:
  num_clients: 2
client:
  schedule: linear
runtime:
  data_path: data/example.csv  # for trials on this machine; in a deployment each node names its own
""",
    "fedgrass": """\
task:
  labels: [account, delivery, invoice]  # all of them, in one order: a site's file may lack some
  max_tokens: 96
partition:
  num_clients: 2
client:
  schedule: linear
  clip_norm: 0  # no two layers' gradients are held at a time
runtime:
  data_path: data/example.csv  # for trials on this machine; in a deployment each node names its own
""",
    "fedprompt": """\
task:
  labels: [account, delivery, invoice]  # all of them, in one order: a site's file may lack some
  max_tokens: 96
partition:
  num_clients: 2
method:
  placement: before  # the server does not know the text that the sites ask with
client:
  batch_size: 4
  schedule: linear
optimizer:
  learning_rate: 0.01
runtime:
  data_path: data/example.csv  # for trials on this machine; in a deployment each node names its own
""",
    "fedresprompt": """\
partition:
  num_clients: 2
method:
  length: 8
  controller_size: 32
client:
  batch_size: 12
  schedule: linear
optimizer:
  learning_rate: 0.001
task:
  train_rows: 72
  validation_rows: 30
  test_rows: 300
""",
}
"""What an experiment sets, by method."""

NODE = Template("""\
# Facts of one node, for `flower-supernode --node-config`. No run can read or change them.
partition-id = $place
num-partitions = $num_nodes
state-path = "/srv/fedllm/state"  # what this site's clients keep for themselves; back it up
${data}# model-path = "/srv/fedllm/model"  # for model=path
# daemon-socket = "/srv/fedllm/run/daemon.socket"  # of `fedllm daemon`, which keeps the model between messages
# device = "cuda"  # what this node computes on, whatever a run says
""")

NODE_DATA = 'data-path = "/srv/fedllm/data.csv"  # columns text and label; never sent\n'

README = Template("""\
# $name

Federated adaptation of a language model: `$method` on `$model`, with fedllm-flwr $version on Flower.

| File | What |
|---|---|
| `conf/experiment/$name.yaml` | the experiment; `fedllm --cfg job experiment=$name` prints all of its settings |
| `nodes/*.toml` | facts of a node: its place, its data, what it computes on |
${data_line}| `server.py`, `client.py`, `pyproject.toml` | the Flower app that is sent to the nodes |

## Try it here

In this folder, with fedllm-flwr $version installed:

    fedllm experiment=$name
    $deploy

The first runs server and clients in one process. The second starts a SuperLink with TLS and two authenticated
SuperNodes on this machine, runs the experiment through them, stops them, and prints the commands for real machines.

## At each site

Every site runs one SuperNode that connects outwards to the SuperLink; it opens no port to the world.

1. Install the same version, `fedllm-flwr==$version`, and whatever holds the model (see fedllm's docs/assets.md).
2. `ssh-keygen -t ecdsa -b 384 -N "" -f node`; send `node.pub` to whoever runs the SuperLink, keep `node`.
3. Put the site's facts into a copy of `nodes/site-0.toml`, with a place of its own (0, 1, …).
${data_step}4. Start, and let a supervisor start it again a minute after it ends:

       flower-supernode --superlink superlink.example.org:8443 --root-certificates ca.crt \\
           --auth-supernode-private-key node --node-config nodes/site-0.toml

## Where runs are submitted

With the SuperLink's connection in Flower's `config.toml` (`fedllm deploy --dry-run` prints it), in this folder:

    fedllm experiment=$name $real

Results are in `outputs/`. `fedllm action=status run=DIR` says how far a run is, `fedllm action=resume run=DIR` goes on
with one that stopped. Whoever can reach the SuperLink's control port can run code on every node: read fedllm's
docs/deployment.md and docs/security.md before you open it.
""")

DATA_LINE = "| `data/` | made-up rows for trials; `example.csv` is `site-0.csv` and `site-1.csv` together |\n"
DATA_STEP = """\
   Data is a CSV file with columns `text` and `label`; `task=jsonl`, `parquet` and `dataset_folder` read other forms.
   A malformed row is named by line and column in the node's log, and only there.
"""

SITES = ("north", "south")
FRAMES = (
    "Hello, {}. Please help.",
    "{}, and this is the second time that I write.",
    "Good morning. {}.",
    "I hope that you can help: {}.",
)
SUBJECTS = {
    "account": (
        "I cannot sign in",
        "my password is refused",
        "please close my profile",
        "the confirmation mail never arrives",
        "someone has changed my user name",
    ),
    "delivery": (
        "my parcel has not arrived",
        "the courier left it with a stranger",
        "the box was open and wet",
        "can it come on Saturday instead",
        "the tracking page shows the wrong town",
    ),
    "invoice": (
        "I was charged twice",
        "the total is higher than agreed",
        "where do I find my receipt",
        "my refund has not been paid",
        "the tax number on the bill is wrong",
    ),
}


def example_rows() -> list[dict[str, str]]:
    """Made-up messages to a shop: ``text``, ``label`` and the ``client`` that holds them; balanced over both."""
    return [
        {"text": frame.format(subject), "label": label, "client": SITES[(f + s) % len(SITES)]}
        for f, frame in enumerate(FRAMES)
        for label, subjects in SUBJECTS.items()
        for s, subject in enumerate(subjects)
    ]


def csv_text(rows: list[dict[str, str]]) -> str:
    """Rows with equal keys as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
