# ltn: TransNormerLLM inference in C and CUDA.  `make` alone prints what can be made.

VERSION := 0.1.0
PREFIX  ?= /usr/local
DESTDIR ?=
JOBS    ?= $(shell nproc)

# VARIANT=asan builds everything, with AddressSanitizer and UBSan, beside the ordinary build.
VARIANT ?= release
B       := build/$(VARIANT)
BIN     := $(if $(filter release,$(VARIANT)),.,$(B))

NVCC    ?= $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
COMMON  := -I. -O3 -g -fPIC -fvisibility=hidden -pthread -fno-math-errno -Wall -Wextra -Werror -DLTN_VERSION='"$(VERSION)"'
LDLIBS  := -lcjson -lsentencepiece -lpcre2-8 -lxxhash -lstdc++ -ldl -lm -pthread
ifeq ($(VARIANT),asan)
COMMON  += -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
LDFLAGS += -fsanitize=address,undefined
endif
CFLAGS   += -std=c11 -D_GNU_SOURCE $(COMMON)
CXXFLAGS += -std=c++17 $(COMMON)
# One instruction set per file: kernels/cpu/NAME_avx2.c, NAME_avx512.c, NAME_vnni.c; chosen at run time.
%_avx2.c.o:   CFLAGS += -mavx2 -mfma -mf16c
AVX512       := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512
%_avx512.c.o: CFLAGS += $(AVX512)
%_vnni.c.o:   CFLAGS += $(AVX512) -mavx512vnni

# Everything in these folders but the programs' own files is the library.
MAINS    := src/run.c src/bench.c src/score.c src/info.c
RUN_SRC  := src/run_options.c src/interactive.c src/terminal.c
BENCH_SRC := $(wildcard src/bench_*.c)
LIB_SRC  := $(filter-out $(MAINS) $(RUN_SRC) $(BENCH_SRC),$(wildcard kernels/*.c kernels/cpu/*.c kernels/conv/*.c model/*.c tokenizer/*.c tokenizer/*.cc src/*.c))
LIB_OBJ  := $(LIB_SRC:%=$(B)/%.o)
TOOL_OBJ := $(patsubst %,$(B)/%.o,$(filter-out tools/convert.c,$(wildcard tools/*.c)))
TEST_SRC := $(wildcard tests/test_*.c) tests/make_model.c tests/typist.c
TEST_BIN := $(TEST_SRC:tests/%.c=$(B)/tests/%)
TEST_OBJ := $(patsubst %,$(B)/%.o,$(filter-out $(TEST_SRC),$(wildcard tests/*.c))) $(B)/tests/cuda/device.c.o
CUDA_BIN := $(addprefix $(B)/tests/cuda/,test_session test_ops test_quant test_decode test_prefill bench_ops test_conv)
ATTN_SRC := kernels/cuda/lightning_mma.cu kernels/cuda/lightning_hopper.cu kernels/cuda/lightning_turn.cu
CUDA_OBJ := $(patsubst %,$(B)/%.o,$(wildcard kernels/cuda/*.cu))
CONV_OBJ := $(patsubst %,$(B)/%.o,$(wildcard kernels/conv/*.cu) kernels/conv/shape.c kernels/conv/fused_plan.c kernels/conv/fused_tma_plan.c kernels/status.c)
PROGRAMS := $(patsubst src/%.c,$(BIN)/ltn-%,$(MAINS)) $(BIN)/tools/convert
NAMES    := $(MAINS:src/%.c=ltn-%) ltn-convert
BENCHES  := $(patsubst src/bench_%.c,ltn-bench-%,$(filter-out src/bench_model.c,$(BENCH_SRC)))
MAN      := $(NAMES:%=$(B)/man/%.1) $(BENCHES:%=$(B)/man/%.1)
COMPLETE := $(NAMES:%=$(B)/completions/%)
CUDA_LIB := $(if $(NVCC),$(BIN)/libltn_cuda.so $(BIN)/libltn_conv.so)
DEMO     := model/demo/demo.ltn

# V=1 prints whole command lines.
say = $(if $(V),,@echo "  $(1) $@";)

.PHONY: help setup all programs demo test test-cuda sanitize-cuda gpu bench-gpu check install uninstall clean format
.DELETE_ON_ERROR:
.SECONDARY:

help: ## print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: ## install what is missing to build and test (Debian packages; root or sudo)
	@sh tools/setup.sh

all: programs docs $(CUDA_LIB) ## build programs, library, man pages, and the CUDA backend where nvcc is found
	@$(if $(NVCC),,echo "no nvcc: built without the CUDA backend" >&2)

demo: setup ## set up, build, and let the model that ships with the repo tell a story
	@$(MAKE) --no-print-directory -j$(JOBS) all
	./ltn-run -p "Once upon a time" -n 250 --echo -q

test: setup ## set up, build, and run every test that needs no GPU
	@$(MAKE) --no-print-directory -j$(JOBS) all tests
	@sh tests/run.sh $(B)/tests $(BIN)

check: setup ## the same tests under AddressSanitizer and UBSan
	@$(MAKE) --no-print-directory -j$(JOBS) VARIANT=asan NVCC= all tests
	@sh tests/run.sh build/asan/tests build/asan

# The tests of the GPU, in parts that run side by side.
GPU_TESTS := attention model quant decode session prefill ops-F32 ops-F16 ops-BF16 conv-1 conv-2 conv-3 conv-4 conv-images
GPU_RUNS  := $(GPU_TESTS:%=run-gpu-%)

test-cuda: setup ## run the tests that need a GPU
	@$(MAKE) --no-print-directory -j$(JOBS) all $(CUDA_BIN) $(B)/tests/cuda/attention $(B)/tests/test_model
	@$(MAKE) --no-print-directory -j$(JOBS) --output-sync=target -k $(GPU_RUNS)

.PHONY: $(GPU_RUNS)
$(GPU_RUNS): export LTN_BIN := $(BIN)
$(GPU_RUNS): export LTN_TEST_CUDA := 1
$(GPU_RUNS): export LD_LIBRARY_PATH := $(BIN):$(LD_LIBRARY_PATH)
run-gpu-attention:
	$(B)/tests/cuda/attention test
run-gpu-model:
	$(B)/tests/test_model
$(addprefix run-gpu-,quant decode session prefill): run-gpu-%:
	$(B)/tests/cuda/test_$*
$(filter run-gpu-ops-%,$(GPU_RUNS)): run-gpu-ops-%:
	$(B)/tests/cuda/test_ops '*, $*'
run-gpu-conv-images: # the twelve layers with whole batches
	$(B)/tests/cuda/test_conv 0 1
$(addprefix run-gpu-conv-,1 2 3 4): run-gpu-conv-%: # 150 random shapes each
	$(B)/tests/cuda/test_conv 150 $*000

sanitize-cuda: setup ## run short GPU tests under compute-sanitizer: memory, initialisation, barriers, races
	@$(MAKE) --no-print-directory -j$(JOBS) all $(CUDA_BIN) $(B)/tests/cuda/attention
	LD_LIBRARY_PATH=$(BIN):$$LD_LIBRARY_PATH LTN_BIN=$(BIN) sh tests/cuda/sanitize.sh $(B)/tests/cuda $(JOBS)

gpu: ## everything that needs a GPU: test-cuda, then bench-gpu
	@$(MAKE) --no-print-directory test-cuda
	@$(MAKE) --no-print-directory bench-gpu

BENCH_GPU := decode quant attention prefill conv
.PHONY: $(BENCH_GPU:%=bench-%) $(BENCH_GPU:%=measure-%)
bench-gpu: ## measure on a GPU, beside peers, into tools/results; bench-decode, -quant, -attention, -prefill, -conv: a part
	@for part in $(BENCH_GPU); do $(MAKE) --no-print-directory bench-$$part || exit 1; done

$(BENCH_GPU:%=bench-%): bench-%: setup
	@$(MAKE) --no-print-directory -j$(JOBS) all $(B)/tests/cuda/libattention.so
	@mkdir -p tools/results
	@$(MAKE) --no-print-directory measure-$*

measure-decode:
	$(BIN)/ltn-bench decode --device cuda --shape all --batch 1,8,64,256 --position 0,10000,1000000 --format json >tools/results/decode.new
	mv tools/results/decode.new tools/results/decode.json
	python3 tools/decode_table.py
measure-quant:
	for d in q8 fp8 q4; do $(BIN)/ltn-bench decode --device cuda --shape all --dtype $$d --format json >$(B)/gpu-$$d.json || exit 1; done
	for d in bf16 q8 fp8 q4; do $(BIN)/ltn-bench decode --device cpu --shape 385m --dtype $$d -r 9 --format json >$(B)/cpu-$$d.json || exit 1; done
	python3 tools/quant_table.py $(patsubst %,--bench %.json,tools/results/decode $(addprefix $(B)/gpu-,q8 fp8 q4) $(addprefix $(B)/cpu-,bf16 q8 fp8 q4))
measure-attention:
	python3 tools/bench_attention_peers.py --ltn $(B)/tests/cuda/libattention.so -o tools/results/attention.json
measure-prefill:
	python3 tools/bench_prefill.py --bench $(BIN)/ltn-bench -o tools/results/prefill.json
measure-conv:
	$(BIN)/ltn-bench conv --device cuda --format json >tools/results/conv.new
	mv tools/results/conv.new tools/results/conv.json
	python3 tools/bench_conv_torch.py -o tools/results/conv_torch.json
	python3 tools/plot_conv.py

programs: $(PROGRAMS) $(B)/libltn.a $(BIN)/libltn.so

.PHONY: docs tests
docs: $(MAN) $(COMPLETE)

tests: $(TEST_BIN)

$(B)/libltn.a: $(LIB_OBJ)
	@rm -f $@
	$(call say,AR)ar rcs $@ $^

# The CUDA backend is found beside the library.
$(BIN)/libltn.so: $(LIB_OBJ) src/exports
	$(call say,LD)$(CC) -shared -Wl,-soname,libltn.so.0,--version-script=src/exports,-rpath,'$$ORIGIN' $(LDFLAGS) \
	    -o $@ $(LIB_OBJ) $(LDLIBS)

$(BIN)/ltn-run: $(RUN_SRC:%=$(B)/%.o)
$(BIN)/ltn-run: LDLIBS += -ledit
$(BIN)/ltn-bench: $(BENCH_SRC:%=$(B)/%.o)
$(BIN)/ltn-%: $(B)/src/%.c.o $(B)/libltn.a
	$(call say,LD)$(CC) $(LDFLAGS) -o $@ $(filter %.o,$^) $(filter %.a,$^) $(LDLIBS)

$(BIN)/tools/convert: $(B)/tools/convert.c.o $(TOOL_OBJ) $(B)/libltn.a
	@mkdir -p $(@D)
	$(call say,LD)$(CC) $(LDFLAGS) -o $@ $^ -lzip $(LDLIBS)

# Man pages and completions are what the programs make of their own tables of options (src/cli_docs.c).
$(B)/man/ltn-convert.1 $(B)/completions/ltn-convert: $(BIN)/tools/convert
$(filter-out %/ltn-convert.1,$(NAMES:%=$(B)/man/%.1)): $(B)/man/%.1: $(BIN)/%
$(BENCHES:%=$(B)/man/%.1): $(BIN)/ltn-bench
$(filter-out %/ltn-convert,$(COMPLETE)): $(B)/completions/%: $(BIN)/%
$(MAN):
	@mkdir -p $(@D)
	$(call say,MAN)$(abspath $<) $(patsubst ltn-bench-%,%,$(filter ltn-bench-%,$(@F:.1=))) --print-man >$@
$(COMPLETE):
	@mkdir -p $(@D)
	$(call say,BASH)$(abspath $<) --print-completion >$@

$(B)/tests/%: $(B)/tests/%.c.o $(TEST_OBJ) $(TOOL_OBJ) $(B)/libltn.a
	$(call say,LD)$(CC) $(LDFLAGS) -o $@ $^ -lcmocka -lzip $(LDLIBS)

$(B)/%.c.o: %.c Makefile
	@mkdir -p $(@D)
	$(call say,CC)$(CC) $(CFLAGS) -MMD -MP -c -o $@ $<

$(B)/%.cc.o: %.cc Makefile
	@mkdir -p $(@D)
	$(call say,CXX)$(CXX) $(CXXFLAGS) -MMD -MP -c -o $@ $<

CUDA_ARCH ?= -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
             -gencode=arch=compute_90,code=compute_90
$(B)/%.cu.o: %.cu
	@mkdir -p $(@D)
	$(call say,NVCC)$(NVCC) -std=c++17 -O3 -I. -Xcompiler -fPIC,-Wall,-Wextra,-fvisibility=hidden $(CUDA_ARCH) -MMD -MP -c -o $@ $<

$(B)/tests/cuda/attention: $(ATTN_SRC:%=$(B)/%.o) $(B)/tests/cuda/attention.cu.o
	$(call say,NVCC)$(NVCC) -cudart static -o $@ $^

# Makes kernels/cuda/gemm_table.h.
$(B)/tests/cuda/tune_gemm: $(B)/tests/cuda/tune_gemm.cu.o
	$(call say,NVCC)$(NVCC) -cudart static -o $@ $^ -lcublasLt

# What the peers' script times beside them.
$(B)/tests/cuda/libattention.so: $(ATTN_SRC:%=$(B)/%.o) $(B)/tests/cuda/attention.cu.o
	$(call say,NVCC)$(NVCC) -shared -cudart static -o $@ $^

$(BIN)/libltn_cuda.so: $(CUDA_OBJ) $(B)/kernels/status.c.o kernels/cuda/exports
	$(call say,NVCC)$(NVCC) -shared -cudart static -Xlinker --version-script=kernels/cuda/exports -o $@ $(filter %.o,$^) -ldl

$(BIN)/libltn_conv.so: $(CONV_OBJ) kernels/conv/exports
	$(call say,NVCC)$(NVCC) -shared -cudart static -Xlinker --version-script=kernels/conv/exports -o $@ $(filter %.o,$^) -ldl

# ---- installation ----------------------------------------------------------------------------------------------------

DEST      := $(DESTDIR)$(PREFIX)
INSTALLED := $(NAMES:%=bin/%) $(MAN:$(B)/man/%=share/man/man1/%) $(NAMES:%=share/bash-completion/completions/%) \
             lib/libltn.a lib/libltn.so.0 lib/libltn.so lib/libltn_cuda.so lib/libltn_conv.so lib/ltn lib/pkgconfig/ltn.pc \
             include/ltn share/ltn

install: all ## install programs, library, header, binding, man pages and demo model under PREFIX (/usr/local)
	install -d $(addprefix $(DEST)/,bin lib/ltn lib/pkgconfig include/ltn/kernels share/ltn share/man/man1 \
	    share/bash-completion/completions)
	install $(filter-out %/convert,$(PROGRAMS)) $(DEST)/bin
	install $(BIN)/tools/convert $(DEST)/bin/ltn-convert
	install -m 644 $(B)/libltn.a $(DEST)/lib
	install $(BIN)/libltn.so $(DEST)/lib/libltn.so.0
	ln -sf libltn.so.0 $(DEST)/lib/libltn.so
	$(if $(CUDA_LIB),install $(CUDA_LIB) $(DEST)/lib)
	install -m 644 bindings/ltn.py $(DEST)/lib/ltn
	install -m 644 src/ltn.h $(DEST)/include/ltn
	install -m 644 kernels/status.h $(DEST)/include/ltn/kernels
	install -m 644 $(DEMO) $(DEST)/share/ltn
	install -m 644 $(MAN) $(DEST)/share/man/man1
	install -m 644 $(COMPLETE) $(DEST)/share/bash-completion/completions
	printf '%s\n' 'prefix=$(PREFIX)' 'Name: ltn' 'Description: TransNormerLLM inference' 'Version: $(VERSION)' \
	    'Cflags: -I$${prefix}/include/ltn' 'Libs: -L$${prefix}/lib -lltn' 'Libs.private: $(LDLIBS)' \
	    >$(DEST)/lib/pkgconfig/ltn.pc

uninstall: ## remove what install put there
	cd $(DEST) && rm -rf $(INSTALLED)

format: ## lay out the code with clang-format
	clang-format -i $$(git ls-files '*.c' '*.h' '*.cc' '*.cu' '*.cuh')

clean: ## remove everything that was built
	rm -rf build $(PROGRAMS) libltn.so libltn_cuda.so libltn_conv.so

-include $(shell find $(B) -name '*.d' 2>/dev/null)
