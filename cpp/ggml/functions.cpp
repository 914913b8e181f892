#include "functions.h"

#include <array>
#include <cstring>
#include <utility>

namespace mixkvq::MIXKVQ_GLUE {

#define MIXKVQ_DEFINE(result, name, arguments) result(*name) arguments = nullptr;
MIXKVQ_GGML_FUNCTIONS(MIXKVQ_DEFINE)
#undef MIXKVQ_DEFINE
#define MIXKVQ_DEFINE(name) ggml_op GGML_OP_##name = ggml_op(-1);
MIXKVQ_GGML_OPS(MIXKVQ_DEFINE)
#undef MIXKVQ_DEFINE
#define MIXKVQ_DEFINE(name, text) ggml_type GGML_TYPE_##name = ggml_type(-1);
MIXKVQ_GGML_TYPES(MIXKVQ_DEFINE)
#undef MIXKVQ_DEFINE

bool has_compute_flag = true;
bool asserts_sizes = false;

namespace {

// So many numbers are tried. Every ggml that has the functions has more operations and types, and checks no number.
constexpr int kOps = 80, kTypes = 32;

// The number with this name; false: there is none.
template <class Number> bool number_of(const char * (*name_of)(Number), int n, const char * name, Number & number) {
    for (int i = 0; i < n; ++i) {
        const char * const found = name_of(Number(i));
        if (!found || std::strcmp(found, name) != 0) continue;
        number = Number(i);
        return true;
    }
    return false;
}

std::string missing;  // the first name that was not found

template <class F> void look_up(const GgmlLibrary & library, const char * name, F *& function) {
    function = reinterpret_cast<F *>(library.find(name));
    if (!function && missing.empty()) missing = std::string("function ") + name;
}

// ---- the layout ----

constexpr size_t kWords = 48;  // more than any of the structs has
size_t answered = kWords;

template <size_t I> size_t answer() {
    answered = I;
    return 0;
}
using Words = std::array<size_t (*)(), kWords>;
template <size_t... I> Words words(std::index_sequence<I...>) { return {answer<I>...}; }

}  // namespace

bool load_functions(const GgmlLibrary & library, std::string & error) {
    missing.clear();
#define MIXKVQ_LOOK_UP(result, name, arguments) look_up(library, #name, name);
    MIXKVQ_GGML_FUNCTIONS(MIXKVQ_LOOK_UP)
#undef MIXKVQ_LOOK_UP
    if (missing.empty()) {
#define MIXKVQ_LOOK_UP(name) \
    if (!number_of(ggml_op_name, kOps, #name, GGML_OP_##name)) missing = "operation " #name;
        MIXKVQ_GGML_OPS(MIXKVQ_LOOK_UP)
#undef MIXKVQ_LOOK_UP
#define MIXKVQ_LOOK_UP(name, text) \
    if (!number_of(ggml_type_name, kTypes, text, GGML_TYPE_##name)) missing = "type " text;
        MIXKVQ_GGML_TYPES(MIXKVQ_LOOK_UP)
#undef MIXKVQ_LOOK_UP
    }
    has_compute_flag = library.find("ggml_build_forward_select") != nullptr;
    asserts_sizes = library.asserts();
    if (!missing.empty()) error = "ggml has no " + missing;
    return missing.empty();
}

bool check_layout(std::string & error) {
    Words table = words(std::make_index_sequence<kWords>());
    void * const at = table.data();
    const auto buft = static_cast<ggml_backend_buffer_type_t>(at);
    const auto buffer = static_cast<ggml_backend_buffer_t>(at);
    const auto backend = static_cast<ggml_backend_t>(at);
    const auto device = static_cast<ggml_backend_dev_t>(at);
    const auto reg = static_cast<ggml_backend_reg_t>(at);
    ggml_tensor empty = {};
    uint8_t props[2 * sizeof(ggml_backend_dev_props)];
    std::memset(props, 0xff, sizeof(props));
    const char * wrong = nullptr;
    const auto expect = [&](const char * function, size_t place, bool there) {
        if (!there || answered != place / kWord) wrong = wrong ? wrong : function;
        answered = kWords;
    };
// Of the function that ggml calls, its place in the struct; of a member that it returns, what stands there.
#define CALLS(function, arguments, type, member) \
    (void)function arguments;                    \
    expect(#function, offsetof(type, member), true)
#define RETURNS(function, type, member)                                                         \
    expect(#function, kWords * kWord, reinterpret_cast<void *>(uintptr_t(function(static_cast<type *>(at)))) == \
                                          reinterpret_cast<void *>(table[offsetof(type, member) / kWord]))
    CALLS(ggml_backend_buft_name, (buft), ggml_backend_buffer_type, iface.get_name);
    CALLS(ggml_backend_buft_get_alignment, (buft), ggml_backend_buffer_type, iface.get_alignment);
    CALLS(ggml_backend_buft_get_max_size, (buft), ggml_backend_buffer_type, iface.get_max_size);
    CALLS(ggml_backend_buft_get_alloc_size, (buft, &empty), ggml_backend_buffer_type, iface.get_alloc_size);
    CALLS(ggml_backend_buft_is_host, (buft), ggml_backend_buffer_type, iface.is_host);
    RETURNS(ggml_backend_buft_get_device, ggml_backend_buffer_type, device);
    CALLS(ggml_backend_buffer_clear, (buffer, 0), ggml_backend_buffer, iface.clear);
    CALLS(ggml_backend_buffer_reset, (buffer), ggml_backend_buffer, iface.reset);
    RETURNS(ggml_backend_buffer_get_type, ggml_backend_buffer, buft);
    RETURNS(ggml_backend_buffer_get_size, ggml_backend_buffer, size);
    CALLS(ggml_backend_name, (backend), ggml_backend, iface.get_name);
    CALLS(ggml_backend_synchronize, (backend), ggml_backend, iface.synchronize);
    CALLS(ggml_backend_graph_compute_async, (backend, nullptr), ggml_backend, iface.graph_compute);
    CALLS(ggml_backend_event_record, (nullptr, backend), ggml_backend, iface.event_record);
    CALLS(ggml_backend_event_wait, (backend, nullptr), ggml_backend, iface.event_wait);
    RETURNS(ggml_backend_get_device, ggml_backend, device);
    CALLS(ggml_backend_dev_name, (device), ggml_backend_device, iface.get_name);
    CALLS(ggml_backend_dev_type, (device), ggml_backend_device, iface.get_type);
    CALLS(ggml_backend_dev_get_props, (device, reinterpret_cast<ggml_backend_dev_props *>(props)), ggml_backend_device, iface.get_props);
    CALLS(ggml_backend_dev_supports_op, (device, &empty), ggml_backend_device, iface.supports_op);
    CALLS(ggml_backend_dev_supports_buft, (device, buft), ggml_backend_device, iface.supports_buft);
    CALLS(ggml_backend_event_new, (device), ggml_backend_device, iface.event_new);
    RETURNS(ggml_backend_dev_backend_reg, ggml_backend_device, reg);
    CALLS(ggml_backend_reg_name, (reg), ggml_backend_reg, iface.get_name);
    CALLS(ggml_backend_reg_get_proc_address, (reg, ""), ggml_backend_reg, iface.get_proc_address);
#undef CALLS
#undef RETURNS
    // ggml sets the properties to 0 before it asks for them.
    const auto is_zero = [&](size_t i) { return props[i] == 0; };
    if (!wrong && (!is_zero(sizeof(ggml_backend_dev_props) - 1) || is_zero(sizeof(ggml_backend_dev_props)))) wrong = "ggml_backend_dev_get_props";
    if (wrong) error = std::string("ggml has other structs than it should: ") + wrong;
    return !wrong;
}

}  // namespace mixkvq::MIXKVQ_GLUE
