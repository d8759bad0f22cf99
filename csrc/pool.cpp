#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "coreinfer_kernels.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace coreinfer {
namespace {

constexpr int kSpinsBeforeYield = 2000;   // some tens of microseconds
constexpr int kYieldsBeforeSleep = 50;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins, then yields: whoever is waited for may have been put off this processor.
template <class Done>
bool spin_until(const Done& done, int max_yields) {
  for (int i = 0; i < kSpinsBeforeYield; ++i) {
    if (done()) return true;
    relax();
  }
  for (int i = 0; max_yields < 0 || i < max_yields; ++i) {
    if (done()) return true;
    std::this_thread::yield();
  }
  return done();
}

}  // namespace

class Barrier {
 public:
  void wait(int count) {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; }, -1);
  }

 private:
  // Apart, so that those who wait do not slow those who arrive.
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

void Worker::wait() const {
  if (count > 1) barrier->wait(count);
}

namespace {

// The OpenMP runtime that torch computes with, by the entry points that GCC's and LLVM's share.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

struct Job {
  Region region;
  const void* context;
  uint8_t* scratch;
  Barrier* barrier;
  const OpenMp* openmp;

  void run(int index, int count) const { region(context, {index, count, scratch, barrier}); }
};

class Pool {
 public:
  // From now on regions run on the threads of that runtime. Two sets of threads that take turns
  // would be in each other's way: each spins for its next region while the other has work to do.
  void use(const OpenMp& openmp) { openmp_ = openmp; }

  void run(int threads, size_t scratch_bytes, Region region, const void* context) {
    const std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
    reserve(scratch_bytes);
    job_ = {region, context, scratch_, &barrier_, &openmp_};
    if (threads == 1) {
      job_.run(0, 1);
    } else if (openmp_.parallel != nullptr) {
      const auto body = [](void* data) {
        const Job& job = *static_cast<const Job*>(data);
        job.run(job.openmp->thread_num(), job.openmp->num_threads());
      };
      openmp_.parallel(body, &job_, static_cast<unsigned>(threads), 0);
    } else {
      run_on_own_threads(threads);
    }
  }

 private:
  void run_on_own_threads(int threads) {
    while (static_cast<int>(threads_.size()) + 1 < threads) {
      const int index = static_cast<int>(threads_.size()) + 1;
      threads_.emplace_back([this, index, seen = generation_.load()] { serve(index, seen); });
    }
    count_ = threads;
    pending_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(sleep_mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job_.run(0, threads);
    spin_until([&] { return pending_.load(std::memory_order_acquire) == 0; }, -1);
  }

  void serve(int index, uint64_t seen) {
    for (;;) {
      const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(called, kYieldsBeforeSleep)) {
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        wake_.wait(lock, called);
      }
      ++seen;
      if (index < count_) job_.run(index, count_);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  void reserve(size_t bytes) {
    if (bytes <= scratch_bytes_) return;
    std::free(scratch_);
    scratch_bytes_ = (bytes + 4095) / 4096 * 4096;
    scratch_ = static_cast<uint8_t*>(std::aligned_alloc(4096, scratch_bytes_));
    if (scratch_ == nullptr) std::abort();  // a few megabytes: nothing sensible is left to do
  }

  std::mutex run_mutex_;
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  OpenMp openmp_;
  Job job_ = {};
  Barrier barrier_;
  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<int> pending_{0};
  int count_ = 1;
  uint8_t* scratch_ = nullptr;
  size_t scratch_bytes_ = 0;
};

// Never destroyed: its threads wait until the process ends.
std::atomic<Pool*> current{nullptr};
std::mutex creation;

Pool& pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  const std::lock_guard<std::mutex> lock(creation);
  found = current.load(std::memory_order_relaxed);
  if (found == nullptr) {
    found = new Pool;
    current.store(found, std::memory_order_release);
#if defined(__unix__) || defined(__APPLE__)
    // A forked child has none of the threads, OpenMP's neither: it starts its own.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    static_cast<void>(registered);
#endif
  }
  return *found;
}

}  // namespace

void run_region(int threads, size_t scratch_bytes, Region region, const void* context) {
  if (threads <= 1 && scratch_bytes == 0) {
    region(context, {0, 1, nullptr, nullptr});  // nothing is shared: beside any other region
  } else {
    pool().run(threads < 1 ? 1 : threads, scratch_bytes, region, context);
  }
}

}  // namespace coreinfer

void ci_use_openmp(void* parallel, void* thread_num, void* num_threads) {
  coreinfer::OpenMp openmp;
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
  openmp.thread_num = reinterpret_cast<decltype(openmp.thread_num)>(thread_num);
  openmp.num_threads = reinterpret_cast<decltype(openmp.num_threads)>(num_threads);
  coreinfer::pool().use(openmp);
}
