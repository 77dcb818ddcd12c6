"""launcher/run.py where rank 1 pretends to be another host with a recipe of its own; ODD (JSON): what else it has."""

import json
import os
import socket
import sys

from launcher import preflight, run
from toolkit.ranks import last_words

ODD = json.loads(os.environ["ODD"])
own_facts = preflight.own_facts

if os.environ["RANK"] == "1":
    socket.gethostname = lambda: "node2"
    sys.argv += ["--set", "seed=7"]
    preflight.own_facts = lambda *what: own_facts(*what) | ODD
last_words.end(run.main())
