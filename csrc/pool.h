// Threads that stay, so that a parallel region costs microseconds: torch's own where they can be had.
#pragma once

#include <cstddef>
#include <cstdint>

namespace coreinfer {

class Barrier;

// One of the threads of a region.
struct Worker {
  int index;
  int count;
  uint8_t* scratch;  // shared by all of them, 64-byte aligned
  Barrier* barrier;

  // Returns once all workers of the region have come here.
  void wait() const;
};

struct Range {
  int64_t begin;
  int64_t end;
};

// This worker's part of 0..count-1: always the same, and in order of the workers.
inline Range share(const Worker& worker, int64_t count) {
  return {count * worker.index / worker.count, count * (worker.index + 1) / worker.count};
}

using Region = void (*)(const void* context, const Worker& worker);

// Runs the region on that many threads, the caller's among them. One region runs at a
// time, but for those of one thread without scratch: callers on threads of their own run side by side.
void run_region(int threads, size_t scratch_bytes, Region region, const void* context);

template <class Body>
void parallel(int threads, size_t scratch_bytes, const Body& body) {
  run_region(
      threads, scratch_bytes,
      [](const void* context, const Worker& worker) { (*static_cast<const Body*>(context))(worker); },
      &body);
}

}  // namespace coreinfer
