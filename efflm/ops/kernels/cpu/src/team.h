// Fork and join on the threads of a pool that belongs to someone else.
//
// A helper that has run out of work waits a moment for more before it gives its thread back: decoding is hundreds of
// short kernels in a row, and waking a thread takes as long as one of them. The caller takes part and waits only for
// work that a helper has begun, so that it never waits for a thread that the pool does not have.
//
// Beside other busy processes there are fewer free cores than threads, and a helper does harm in two ways. Woken on the
// caller's own core it keeps the caller from running: it moves to another core while it helps. Where there is none that
// it may use it leaves, and no other is woken for a moment. Taken off its core in the middle of a task it lets the
// caller wait for milliseconds: it leaves when that task is done, and the caller does with one helper less for as long
// as it has waited; for up to kPatience times as long where this happens again and again.
#pragma once

#include <sched.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace efflm {
namespace {

// The threads that may help: `threads` in all with the caller, at least 1; `schedule` starts a function on one of them.
struct Pool {
  using Schedule = void (*)(void* context, void (*function)());
  int threads = 1;
  Schedule schedule = nullptr;
  void* context = nullptr;

  Pool() = default;
  Pool(int64_t most, Schedule schedule, void* context)
      : threads(most > 1 ? int(most) : 1), schedule(schedule), context(context) {}
};

class Team {
 public:
  static constexpr int64_t kMost = 65535;  // tasks of one call that are shared; more are done by the caller alone

  // task(i) for every i in [0, count), on as many threads as there are. One call at a time is shared: another one that
  // comes meanwhile, from a second device or Python thread, is done by its caller alone. Throws what a task throws that
  // the caller does alone; std::bad_alloc, when all are done, if one that was shared has thrown.
  template <typename Task>
  static void run(const Pool& pool, int64_t count, const Task& task) {
    State& state = shared();
    if (count < 2 || count > kMost || pool.threads < 2 || state.busy.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    const int64_t began = now();
    state.function.store(&call<Task>, std::memory_order_relaxed);
    state.task.store(&task, std::memory_order_relaxed);
    state.failed.store(false, std::memory_order_relaxed);
    state.core.store(sched_getcpu(), std::memory_order_relaxed);
    state.done.store(0, std::memory_order_relaxed);
    const uint64_t epoch = (state.ticket.load(std::memory_order_relaxed) >> 32) + 1;
    state.ticket.store(epoch << 32 | uint64_t(count) << 16, std::memory_order_seq_cst);
    const int threads = pool.threads - state.resting(pool.threads - 1, began);
    if (began >= state.not_before.load(std::memory_order_relaxed))
      state.wake(pool, int(count < threads ? count : threads) - 1);
    int64_t late_since;
    while (state.take(late_since)) {
    }
    state.join(count, began);
    const bool failed = state.failed.load(std::memory_order_relaxed);
    state.busy.store(false, std::memory_order_release);
    if (failed) throw std::bad_alloc();
  }

 private:
  static constexpr int64_t kMicrosecond = 1000;
  static constexpr int64_t kIdle = 200 * kMicrosecond;  // for which a helper waits for more work
  static constexpr int64_t kLate = 100 * kMicrosecond;  // for which the caller waits without asking the system why
  static constexpr int64_t kPatience = 16, kAgain = 20000 * kMicrosecond;  // kAgain: at least between two such waits
  // Between a helper that had to leave the caller's core and the next try; doubled as long as the next one has to, too.
  static constexpr int64_t kLeastPause = 100 * kMicrosecond, kMostPause = 10000 * kMicrosecond;

  struct State {
    alignas(64) std::atomic<uint64_t> ticket{0};  // 32 bits of epoch, 16 of count, 16 of the next task
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<void (*)(const void*, int64_t)> function{nullptr};
    std::atomic<const void*> task{nullptr};
    std::atomic<int> core{-1};           // the caller's
    std::atomic<int64_t> late_since{0};  // when the caller began to wait, if it has waited for long; else 0
    std::atomic<bool> failed{false};     // whether a task has thrown
    alignas(64) std::atomic<int> helpers{0};
    alignas(64) std::atomic<bool> busy{false};
    std::atomic<int> fewer{0};                // helpers that the caller does without
    std::atomic<int64_t> until{0}, span{0};   // when they may come back, and after how long
    std::atomic<int64_t> patience{1};         // that time in multiples of the one for which it was waited
    std::atomic<int64_t> not_before{0}, pause_between{kLeastPause};  // when the next helper may be woken

    // Runs the next task, if there is one; late: `late_since` when that was done. Taking it from this epoch proves that
    // what was read belongs to it: a new epoch begins only when every task of the old one is done.
    bool take(int64_t& late) {
      uint64_t now = ticket.load(std::memory_order_acquire);
      while (true) {
        const uint64_t next = now & 0xffff, count = now >> 16 & 0xffff;
        if (next >= count) return false;
        auto* run = function.load(std::memory_order_relaxed);
        const void* context = task.load(std::memory_order_relaxed);
        if (ticket.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          try {
            run(context, int64_t(next));
          } catch (...) {
            failed.store(true, std::memory_order_relaxed);
          }
          late = late_since.load(std::memory_order_relaxed);
          done.fetch_add(1, std::memory_order_release);
          return true;
        }
      }
    }

    // Has `wanted` helpers at work or on their way. A pool that cannot start one leaves the work to the others.
    void wake(const Pool& pool, int wanted) {
      while (helpers.load(std::memory_order_seq_cst) < wanted) {
        helpers.fetch_add(1);
        try {
          pool.schedule(pool.context, &help);
        } catch (...) {
          helpers.fetch_sub(1);
          return;
        }
      }
    }

    // Waits until all tasks are done. A helper that is waited for longer than the caller itself has worked is late.
    void join(int64_t count, int64_t began) {
      if (done.load(std::memory_order_acquire) == count) return;
      const int64_t start = now(), worked = start - began;
      for (int64_t waited = 0; done.load(std::memory_order_acquire) < count; waited = now() - start) {
        if (waited < kLate) {
          pause();
          continue;
        }
        if (waited > worked) late_since.store(start, std::memory_order_relaxed);
        sched_yield();  // perhaps the helper waits for this core
      }
      late_since.store(0, std::memory_order_relaxed);
    }

    // How many of `most` helpers the caller does without at a time.
    int resting(int most, int64_t time) {
      const int some = fewer.load(std::memory_order_relaxed);
      if (some == 0) return 0;
      if (time > until.load(std::memory_order_relaxed)) {
        fewer.store(0, std::memory_order_relaxed);
        return 0;
      }
      return some < most ? some : most;
    }

    // One helper less, after the caller has waited for it for so long.
    void rest(int64_t waited) {
      const int64_t time = now(), back = time - until.load(std::memory_order_relaxed);
      int64_t times = 2 * patience.load(std::memory_order_relaxed);
      if (back > kAgain + 4 * span.load(std::memory_order_relaxed)) times = 1;
      if (times > kPatience) times = kPatience;
      patience.store(times, std::memory_order_relaxed);
      span.store(times * waited, std::memory_order_relaxed);
      until.store(time + times * waited, std::memory_order_relaxed);
      fewer.fetch_add(1, std::memory_order_relaxed);
    }

    void crowded() {
      const int64_t between = pause_between.load(std::memory_order_relaxed);
      not_before.store(now() + between, std::memory_order_relaxed);
      pause_between.store(2 * between < kMostPause ? 2 * between : kMostPause, std::memory_order_relaxed);
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

  // The cores that a thread may run on. As they were again at the end.
  class Cores {
   public:
    ~Cores() {
      if (known_) sched_setaffinity(0, sizeof all_, &all_);
    }
    // Moves to another core, if there is one.
    bool leave(int core) {
      if (!known_ && sched_getaffinity(0, sizeof all_, &all_) != 0) return false;
      known_ = true;
      cpu_set_t others = all_;
      CPU_CLR(core, &others);
      return CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0;
    }

   private:
    cpu_set_t all_;
    bool known_ = false;
  };

  static void help() {
    State& state = shared();
    Cores cores;
    long switches = taken_off();
    int64_t last = now(), late_since = 0;
    while (true) {
      if (const int core = sched_getcpu(); core >= 0 && core == state.core.load(std::memory_order_relaxed)) {
        if (cores.leave(core)) continue;
        state.crowded();
        break;
      }
      if (state.take(late_since)) {
        last = now();
        state.pause_between.store(kLeastPause, std::memory_order_relaxed);
        if (late_since == 0) continue;
        const long before = switches;
        switches = taken_off();
        if (switches == before) continue;
        state.rest(last - late_since);
        break;
      }
      for (int i = 0; i < 32; ++i) pause();
      if (now() - last > kIdle) break;
    }
    state.helpers.fetch_sub(1, std::memory_order_seq_cst);
  }

  // How often the system took this thread off its core, although it could have gone on.
  static long taken_off() {
    rusage used;
    return getrusage(RUSAGE_THREAD, &used) == 0 ? used.ru_nivcsw : 0;
  }

  static int64_t now() {  // nanoseconds
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
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
