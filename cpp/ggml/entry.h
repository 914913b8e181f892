// What the entry point and the layouts know of each other.
#pragma once

#include <string>

namespace mixkvq {

// The ggml that loads this library. A process may hold several (copies of libggml under one name), so it is found by the address that called
// ggml_backend_init, and all its functions are looked up in that library and those that it depends on.
class GgmlLibrary {
  public:
    // caller: an address in it.
    explicit GgmlLibrary(void * caller);
    void * find(const char * function) const;
    bool asserts() const;  // built without NDEBUG, as far as that can be told

  private:
    void * handle_ = nullptr;
};

}  // namespace mixkvq
