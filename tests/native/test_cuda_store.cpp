// test_store.cpp over the memory of a GPU. Exit code 77 without one.
#define MIXKVQ_TEST_CUDA 1
#include "test_store.cpp"
