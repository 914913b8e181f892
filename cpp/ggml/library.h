// The ggml that loads this library, as far as it does not depend on the layout of its structs.
#pragma once

namespace mixkvq {

// A process may hold several (copies of libggml under one name), so the right one is found by the address that called ggml_backend_init, and all its functions
// are looked up in that library and those that it depends on.
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
