# The commands of this repository. Everything runs in .venv, which the first of them makes.
#
# PYTHON  any Python >= 3.11 with venv and headers
# EXTRA   which faiss: cpu, or gpu (search on a GPU works without it)
# RANKS   ranks of the quickstart on a machine without a GPU; with GPUs there is one rank per GPU
PYTHON ?= python3
EXTRA ?= cpu
RANKS ?= 2

VENV = . .venv/bin/activate &&
# Three at once even on two cores: tests of several processes wait much of their time.
PYTEST = $(VENV) OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python -m pytest
SIDE_BY_SIDE = -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-main test-all lint recipes

quickstart: .venv/installed-$(EXTRA)
	@$(VENV) gpus=$$(python -c 'import torch; n = torch.cuda.device_count(); print(max(r for r in (0, 1, 2, 4, 8) if r <= n))'); \
	if [ $$gpus -gt 0 ]; then \
	    deepspeed --num_gpus $$gpus launcher/run.py recipes/quickstart.json; \
	else \
	    threads=$$(( $$(nproc) / $(RANKS) )); \
	    DS_ACCELERATOR=cpu OMP_NUM_THREADS=$$(( threads > 0 ? threads : 1 )) \
	    deepspeed --num_gpus $(RANKS) launcher/run.py recipes/quickstart.json; \
	fi

test: .venv/installed-cpu,test
	$(PYTEST) $(SIDE_BY_SIDE) -m "not full and not main"

# The main job as launchers run it: the quickstart in small, killed, resumed and compared; on two nodes; with faults.
test-main: .venv/installed-cpu,test
	$(PYTEST) $(SIDE_BY_SIDE) -m "main and not full"

test-all: .venv/installed-cpu,test
	$(PYTEST) $(SIDE_BY_SIDE)

lint: .venv/installed-cpu,test
	$(VENV) ruff check . && ruff format --check . && pyright

# The field reference recipes/README.md, from the schema.
recipes: .venv/installed-cpu,test
	$(VENV) python -m launcher.recipe_reference

# The stamp is written last: an interrupted installation is taken up again, a finished one is left alone.
.venv/installed-%: pyproject.toml constraints.txt
	@sh launcher/preflight.sh $(PYTHON)
	$(PYTHON) -m venv .venv
	$(VENV) python -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@
