"""Each rank prepares crops from good and from bad data and reports what it got."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from toolkit.prepare_crops import prepare_crops
from toolkit.recipe import Data, RecipeError


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    dist.init_process_group("gloo")
    answers = []
    for folder, tokenizer in request["cases"]:
        data = Data.model_validate({"sources": [{"folder": folder}]})
        try:
            answers.append(prepare_crops(data, Path(tokenizer), Path(request["run"])).digest)
        except RecipeError as error:
            answers.append(str(error))
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, answers)
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(everything))
    dist.destroy_process_group()


main()
