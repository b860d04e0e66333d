/* Steps the wall clock of one process: a shim before the C library. The offset, in seconds, is a double in a mapped
 * file, so that another process can change it at any time. Monotonic clocks stay as they are, as in a real step. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile double *offset;

void chaos_clock_use(const char *path) {
  int file = open(path, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(double)) != 0) return;
  void *page = mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (page != MAP_FAILED) offset = page;
}

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("RESILIENTLLM_CHAOS_CLOCK");
  if (path) chaos_clock_use(path);
}

int clock_gettime(clockid_t clock, struct timespec *at) {
  static int (*stock)(clockid_t, struct timespec *);
  if (!stock) stock = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int failed = stock(clock, at);
  if (!failed && clock == CLOCK_REALTIME && offset) at->tv_sec += (time_t)*offset;
  return failed;
}

int gettimeofday(struct timeval *at, void *zone) {
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
