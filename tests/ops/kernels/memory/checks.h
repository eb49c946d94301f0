// What the checks of native kernels share. A check is a program for the compiler's sanitizers (see memory_test.py): it
// draws random cases, in heap blocks of exactly the right size, and compares with plain loops in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "team.h"

using namespace efflm;

namespace {

struct Random {
  std::mt19937_64 bits{0};
  int64_t from(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(bits); }
  bool coin() { return from(0, 1); }
  float normal() { return std::normal_distribution<float>()(bits); }
  template <typename T>
  T of(std::initializer_list<T> values) {
    return values.begin()[from(0, int64_t(values.size()) - 1)];
  }
};

// A block without spare capacity: one byte beyond it is an error that AddressSanitizer sees.
template <typename T>
struct Block {
  int64_t size;
  std::unique_ptr<T[]> data;
  explicit Block(int64_t n) : size(n), data(new T[n]()) {}
  T& operator[](int64_t i) { return data[i]; }
  T* get() { return data.get(); }
};

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("%s\n", what.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

// `count` threads that run what is scheduled; with 0 it waits until the end.
struct Threads {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<void (*)()> waiting;
  bool ended = false;
  std::vector<std::thread> threads;

  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) threads.emplace_back([this] { work(); });
  }
  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      ended = true;
    }
    changed.notify_all();
    for (std::thread& thread : threads) thread.join();
    work();
  }
  void work() {
    while (true) {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [this] { return ended || !waiting.empty(); });
      if (waiting.empty()) return;
      auto* function = waiting.front();
      waiting.pop_front();
      lock.unlock();
      function();
    }
  }
  static void schedule(void* context, void (*function)()) {
    Threads* self = static_cast<Threads*>(context);
    {
      std::lock_guard<std::mutex> lock(self->mutex);
      self->waiting.push_back(function);
    }
    self->changed.notify_one();
  }
  Pool pool(int claimed) { return {claimed, &schedule, this}; }
};

}  // namespace
