"""launcher/run.py with one more method in its table: that of docs/adding_a_method.md, whose folder lies in METHODS."""

import os

from launcher import run
from toolkit import methods
from toolkit.ranks import last_words

methods.__path__.append(os.environ["METHODS"])
methods.TABLE["continuation"] = "toolkit.methods.continuation"
last_words.end(run.main())
