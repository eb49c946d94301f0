// efflm::Team: short calls, several callers, fewer threads than asked for. See checks.h.
#include "checks.h"

namespace {

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

}  // namespace

int main() {
  for (const int there : {3, 1, 0}) {  // threads of the 4 that the pool claims
    Threads threads(there);
    const Pool pool = threads.pool(4);
    count_tasks(pool, 1);
    std::thread other([&] { count_tasks(pool, 2); });
    count_tasks(pool, 3);
    other.join();
  }
}
