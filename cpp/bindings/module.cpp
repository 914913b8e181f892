// The Python module mixkvq.core._native: a table of contents.
#include "register.h"

// The handles of sessions rely on the GIL.
PYBIND11_MODULE(_native, m, pybind11::mod_gil_not_used(false)) {
    m.doc() = "MixKVQ's page format, kernels and backend handle; see _native.pyi.";
    m.attr("__version__") = MIXKVQ_VERSION;
#if defined(MIXKVQ_HAVE_CUDA)
    m.attr("HAS_CUDA") = true;
#else
    m.attr("HAS_CUDA") = false;
#endif
    mixkvq::bindings::register_format(m);
    mixkvq::bindings::register_kernels(m);
    mixkvq::bindings::register_divergence(m);
    mixkvq::bindings::register_backend(m);
}
