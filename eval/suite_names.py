"""The suites that have names of their own, and the tasks of mteb that they mean.

Called by eval.suites and eval.mteb_tasks.
"""

from typing import Literal, NamedTuple

STDLIB: dict[str, Literal["dev", "test"]] = {"stdlib:dev": "dev", "stdlib:test": "test"}
LOCAL = "local"  # the group of whole folders and of the embedded corpus
OPEN_GROUPS = (LOCAL, "quick")  # those that every suite may add to


class Group(NamedTuple):
    """mteb tasks of which one mean is reported."""

    name: str
    tasks: tuple[str, ...]
    main_score: str | None = None  # None: the task's own
    reported: tuple[str, ...] = ()  # besides the usual ones


BEIR = (
    "TRECCOVID", "NFCorpus", "NQ", "HotpotQA", "FiQA2018", "ArguAna", "Touche2020", "CQADupstackRetrieval",
    "QuoraRetrieval", "DBPedia", "SCIDOCS", "FEVER", "ClimateFEVER", "SciFact", "MSMARCO",
)  # fmt: skip
NANO_BEIR = tuple(
    f"Nano{name}Retrieval"
    for name in (
        "ArguAna", "ClimateFever", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO", "NFCorpus", "NQ", "Quora",
        "SCIDOCS", "SciFact", "Touche2020",
    )
)  # fmt: skip
COIR = (
    "AppsRetrieval", "CodeFeedbackMT", "CodeFeedbackST", "CodeSearchNetCCRetrieval", "CodeTransOceanContest",
    "CodeTransOceanDL", "CosQA", "COIRCodeSearchNetRetrieval", "StackOverflowQA", "SyntheticText2SQL",
)  # fmt: skip
BRIGHT_LONG = ("Biology", "EarthScience", "Economics", "Psychology", "Robotics", "Stackoverflow", "SustainableLiving",
               "Pony")  # fmt: skip
BRIGHT = (*BRIGHT_LONG, "Leetcode", "Aops", "TheoremQATheorems", "TheoremQAQuestions")
SUITES: dict[str, list[Group]] = {
    "beir": [Group("BEIR", BEIR)],
    "coir": [Group("CoIR", COIR)],
    "bright": [  # v1.1: the tasks of BRIGHT's first version in mteb let a query find the documents it must not
        Group("BRIGHT", tuple(f"Bright{name}Retrieval" for name in BRIGHT)),
        Group("BRIGHT long", tuple(f"Bright{name}LongRetrieval" for name in BRIGHT_LONG)),
    ],
    "msmarco": [
        Group("", ("MSMARCO",), "mrr_at_10", ("recall_at_50", "recall_at_1000")),
        Group("", ("TRECDL2019", "TRECDL2020")),
    ],
    "stage": [Group("NanoBEIR", NANO_BEIR), Group("", ("CosQA", "BrightPonyRetrieval"))],
}
