// Packed states: what becomes of the caches' rows while llama.cpp saves or loads its own state into or from memory of ours.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "buffer.h"
#include "mixkvq/state.h"

namespace mixkvq::MIXKVQ_GLUE {

struct State;  // a packed state; takes part in what its thread does until it is finished or freed

// nullptr: `why` says so. Throw std::bad_alloc.
std::shared_ptr<State> begin_saving(std::shared_ptr<Session> session, uint64_t size, uint32_t flags);
std::shared_ptr<State> begin_loading(std::shared_ptr<Session> session, const void * data, size_t bytes, uint32_t flags, std::string & why);
void * state_data(State & state, uint64_t * size);
// False: `to` has refused something. Without it only the bytes are counted.
bool finish_saving(State & state, uint64_t n, const StateWriter::Write & to, uint64_t * bytes);
std::string finish_loading(State & state);  // "", or why it went wrong
int32_t first_filler(const State & state);  // the position from which on cells hold nothing and are to be removed; -1: there are none

// Whether a state of this thread takes care of rows that llama.cpp reads or writes: nobody else has to.
bool take_rows(CacheTensor & cache, const void * data, size_t offset, size_t bytes);

}  // namespace mixkvq::MIXKVQ_GLUE
