# make demo: everything from nothing to a picture.  make test: the tests.  Both set up their own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile

.PHONY: demo test test-all test-lowest test-lmms-eval test-space style docs bench space aim-tiny clean

demo: $(VENV)/.installed-demo  ## answer held-out queries from demonstrations; writes demo.png
	$(BIN)/python examples/demo.py --output demo.png

test: $(VENV)/.installed-dev  ## the tests, in minutes, in two processes (make test WORKERS=4; 0: in this one)
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(VENV)/.installed-dev  ## the slow ones too
	$(BIN)/python -m pytest $(PARALLEL) -m ""

test-lowest: $(VENV)-lowest/.installed  ## the tests on the oldest transformers and torch that are declared
	$(VENV)-lowest/bin/python -m pytest $(PARALLEL)

test-lmms-eval: $(VENV)-lmms-eval/.installed  ## the adapter inside the real lmms-eval, in an environment of its own
	$(VENV)-lmms-eval/bin/python -m pytest tests/test_lmms_eval.py

test-space: $(VENV)-space/.installed-test  ## examples/space in a browser: chromium, which Debian has (apt-get install chromium)
	$(VENV)-space/bin/python -m pytest tests/test_space.py

style: $(VENV)/.installed-dev  ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev  ## the docs site, in build/site; broken links are errors
	$(BIN)/mkdocs build --quiet

BENCH ?= build/bench
OWN = zero,overhead,full,prefix-kv,cold,cold-half,bank,bank-kv,depth-cold,depth-bank,depth-bank-kv
OTHERS = text-kv,text-kv-together,parallel-icl,fastv,catp,snapkv,emloc,task-vector
OTHERS_COLD = text-kv-cold,text-kv-together-cold,parallel-icl-cold,snapkv-cold,emloc-cold,task-vector-cold

bench: $(VENV)/.installed-demo  ## all methods counted at all shapes and measured at the CPU's; growth; a bank of 100 000; training
	$(BIN)/python -m modeling_aim.speed.growth --shape all --shots 16 --output $(BENCH)
	$(BIN)/aim bench --shape cpu-64 --shots 0,2,8 --repeats 3 --methods $(OWN),$(OTHERS),$(OTHERS_COLD) --output $(BENCH)/cpu-64
	$(BIN)/aim bench --shape cpu-576 --shots 0,4 --repeats 3 --methods $(OWN) --output $(BENCH)/cpu-576
	$(BIN)/python -m modeling_aim.speed.growth --shape llava-1.5-7b --measured 1000 10000 100000 \
		--bench $(BENCH)/cpu-576/bench.json --output $(BENCH)
	$(BIN)/python -m modeling_aim.speed.bank
	$(BIN)/python -m modeling_aim.speed.training
	$(BIN)/python -m modeling_aim.speed.training_data

space: $(VENV)-space/.installed  ## the Gradio Space on hub_configs/aim-tiny, at http://127.0.0.1:7860
	$(VENV)-space/bin/python examples/space/app.py

aim-tiny: $(VENV)/.installed-dev  ## train hub_configs/aim-tiny again, from nothing; resumes where it was stopped
	$(BIN)/python examples/aim_tiny/build.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.installed-demo

$(VENV)-lowest/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" \
		"transformers==5.5.0" "torch==2.10.0"
	touch $@

$(VENV)-space/.installed: $(VENV)/.installed-demo  # over the packages of that one: Gradio wants an older Pillow
	$(PYTHON) -m venv $(VENV)-space
	$(BIN)/python -c "import sysconfig as s; print(s.get_path('purelib'), s.get_path('platlib'), sep='\n')" > \
		"$$($(VENV)-space/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/over.pth"
	$(VENV)-space/bin/python -m pip install --quiet --disable-pip-version-check -e ".[space]"
	touch $@

$(VENV)-space/.installed-test: $(VENV)-space/.installed
	$(VENV)-space/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test-space]"
	touch $@

$(VENV)-lmms-eval/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-lmms-eval
	$(VENV)-lmms-eval/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" "lmms-eval==0.7.3"
	touch $@

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-lmms-eval $(VENV)-space build *.egg-info demo.png
