// efflm::Team: short calls, several callers, fewer threads than asked for, tasks that throw, cores shared with others.
// See checks.h.
#include <sched.h>
#include <time.h>

#include "checks.h"

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Many short calls: every task is done once, and what it wrote is seen by the caller.
void count_tasks(const Pool& pool, int seed) {
  Random random{std::mt19937_64(seed)};
  for (int64_t call = 0; call < 2000; ++call) {
    const int64_t count = call == 7 ? Team::kMost : call == 8 ? Team::kMost + 1 : random.from(0, 9);
    std::vector<int64_t> done(count, 0);
    Team::run(pool, count, [&](int64_t i) { done[i] += i + 1; });
    for (int64_t i = 0; i < count; ++i) require(done[i] == i + 1, "team: a task was not done once");
    if (random.from(0, 99) == 0) std::this_thread::sleep_for(std::chrono::microseconds(random.from(0, 400)));
  }
}

// How many of some tasks, each of a millisecond in which others may run, were not done by the caller.
int64_t done_by_helpers(const Pool& pool) {
  const auto caller = std::this_thread::get_id();
  std::atomic<int64_t> others{0};
  Team::run(pool, 4, [&](int64_t) {
    others += std::this_thread::get_id() != caller;
    for (const auto end = Clock::now() + milliseconds(1); Clock::now() < end;) sched_yield();
  });
  return others;
}

void require_help(const Pool& pool, const char* what) {
  for (const auto end = Clock::now() + milliseconds(20000); !done_by_helpers(pool);) require(Clock::now() < end, what);
}

void throw_in_tasks(const Pool& pool) {
  for (int64_t bad = 0; bad < 6; ++bad) {
    bool thrown = false;
    std::atomic<int64_t> done{0};
    try {
      Team::run(pool, 6, [&](int64_t i) {
        if (i == bad) throw std::bad_alloc();
        ++done;
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    require(thrown && (done == 5 || pool.threads == 1), "team: what a task threw is lost, or other tasks are");
  }
  const Pool broken(3, [](void*, void (*)()) { throw std::bad_alloc(); }, nullptr);
  count_tasks(broken, 4);
}

void stay_on(int core) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  require(sched_setaffinity(0, sizeof one, &one) == 0, "a thread cannot be kept to a core here");
}

// check(pool), of a caller on one core and one helper on another, or on the same.
template <typename Check>
void on_cores(int callers, int helpers, const Check& check) {
  std::thread([&] {
    stay_on(helpers);
    Threads threads(1);
    stay_on(callers);
    check(threads.pool(2));
  }).join();
}

// A helper on the caller's own core takes nothing: it would only keep the caller from running.
void share_the_callers_core(const Pool& pool) {
  for (int i = 0; i < 20; ++i)
    require(done_by_helpers(pool) == 0, "team: a helper on the caller's core takes tasks");
}

// A helper that was taken off its core in the middle of a task, for longer than the caller has worked, rests.
void share_a_helpers_core(const Pool& pool, int core) {
  std::atomic<bool> ended{false};
  std::thread rival([&] {
    stay_on(core);
    while (!ended) sched_yield();
  });
  for (int i = 0; i < 2; ++i) {
    require_help(pool, "team: a helper rests for ever");
    const auto caller = std::this_thread::get_id();
    std::atomic<bool> begun{false};
    while (!begun) {  // perhaps the helper of the last call has just left
      const auto start = Clock::now();
      Team::run(pool, 2, [&](int64_t) {
        if (std::this_thread::get_id() == caller) {
          while (!begun && Clock::now() < start + milliseconds(50)) sched_yield();
        } else {
          begun = true;
          for (const auto end = Clock::now() + milliseconds(300) + 3 * (Clock::now() - start); Clock::now() < end;)
            sched_yield();
        }
      });
    }
    std::this_thread::sleep_for(milliseconds(10));  // less than it rests
    require(done_by_helpers(pool) == 0, "team: a helper without a core of its own goes on");
  }
  ended = true;
  rival.join();
}

double processor_seconds() {
  timespec used;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
  return used.tv_sec + used.tv_nsec * 1e-9;
}

}  // namespace

int main() {
  for (const int there : {3, 1, 0}) {  // threads of the 4 that the pool claims
    Threads threads(there);
    const Pool pool = threads.pool(4);
    count_tasks(pool, 1);
    std::thread other([&] { count_tasks(pool, 2); });
    count_tasks(pool, 3);
    other.join();
    throw_in_tasks(pool);
  }
  throw_in_tasks(Pool{});
  require(Pool(0, nullptr, nullptr).threads == 1 && Pool(-3, nullptr, nullptr).threads == 1, "a pool without a thread");
  cpu_set_t all;
  sched_getaffinity(0, sizeof all, &all);
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &all)) cores.push_back(core);
  on_cores(cores[0], cores[0], [](const Pool& pool) { share_the_callers_core(pool); });
  if (cores.size() == 1) return 0;
  Threads threads(1);
  std::thread([&] {  // a helper that may run anywhere moves to another core
    stay_on(cores[0]);
    for (int i = 0; i < 20; ++i) require_help(threads.pool(2), "team: nobody moves to help");
  }).join();
  on_cores(cores[0], cores[1], [&](const Pool& pool) {
    require_help(pool, "team: nobody helps after tasks have thrown");
    const double before = processor_seconds();
    std::this_thread::sleep_for(milliseconds(200));
    require(processor_seconds() - before < 0.1, "team: helpers without work use the processor");
    share_a_helpers_core(pool, cores[1]);
  });
}
