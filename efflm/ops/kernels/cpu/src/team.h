// Fork and join on the threads of a pool that belongs to someone else.
//
// A helper that has run out of work waits a moment for more before it gives its thread back: decoding is hundreds of
// short kernels in a row, and waking a thread takes as long as one of them. The caller takes part and waits only for
// work that a helper has begun, so that it never waits for a thread that the pool does not have.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace efflm {
namespace {

// The threads that may help: at most `threads` in all with the caller; `schedule` starts one function on one of them.
struct Pool {
  int threads = 1;
  void (*schedule)(void* context, void (*function)()) = nullptr;
  void* context = nullptr;
};

class Team {
 public:
  static constexpr int64_t kMost = 65535;  // tasks of one call that are shared; more are done by the caller alone

  // task(i) for every i in [0, count), on as many threads as there are. One call at a time is shared: another one that
  // comes meanwhile, from a second device or Python thread, is done by its caller alone.
  template <typename Task>
  static void run(const Pool& pool, int64_t count, const Task& task) {
    State& state = shared();
    if (count < 2 || count > kMost || pool.threads < 2 || state.busy.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    state.function.store(&call<Task>, std::memory_order_relaxed);
    state.task.store(&task, std::memory_order_relaxed);
    state.done.store(0, std::memory_order_relaxed);
    const uint64_t epoch = (state.ticket.load(std::memory_order_relaxed) >> 32) + 1;
    state.ticket.store(epoch << 32 | uint64_t(count) << 16, std::memory_order_seq_cst);
    const int wanted = int(count < pool.threads ? count : pool.threads) - 1;
    while (state.helpers.load(std::memory_order_seq_cst) < wanted) {
      state.helpers.fetch_add(1);
      pool.schedule(pool.context, &help);
    }
    while (state.take()) {
    }
    while (state.done.load(std::memory_order_acquire) < count) pause();
    state.busy.store(false, std::memory_order_release);
  }

 private:
  struct State {
    alignas(64) std::atomic<uint64_t> ticket{0};  // 32 bits of epoch, 16 of count, 16 of the next task
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<void (*)(const void*, int64_t)> function{nullptr};
    std::atomic<const void*> task{nullptr};
    alignas(64) std::atomic<int> helpers{0};
    alignas(64) std::atomic<bool> busy{false};

    // Runs the next task, if there is one. Taking it from this epoch proves that what was read belongs to it: a new
    // epoch begins only when every task of the old one is done.
    bool take() {
      uint64_t now = ticket.load(std::memory_order_acquire);
      while (true) {
        const uint64_t next = now & 0xffff, count = now >> 16 & 0xffff;
        if (next >= count) return false;
        auto* run = function.load(std::memory_order_relaxed);
        const void* context = task.load(std::memory_order_relaxed);
        if (ticket.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          run(context, int64_t(next));
          done.fetch_add(1, std::memory_order_release);
          return true;
        }
      }
    }
  };

  static State& shared() {
    static State* state = new State;  // never destroyed: a helper may outlive the program's last line
    return *state;
  }

  template <typename Task>
  static void call(const void* task, int64_t i) {
    (*static_cast<const Task*>(task))(i);
  }

  static void help() {
    using Clock = std::chrono::steady_clock;
    State& state = shared();
    auto last = Clock::now();
    while (true) {
      if (state.take()) {
        last = Clock::now();
        continue;
      }
      for (int i = 0; i < 32; ++i) pause();
      if (Clock::now() - last > std::chrono::microseconds(200)) break;
    }
    state.helpers.fetch_sub(1, std::memory_order_seq_cst);
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
};

}  // namespace
}  // namespace efflm
