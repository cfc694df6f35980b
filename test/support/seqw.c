/*
 * Writes numbered versions of 4 KiB blocks around the page cache and logs when each write was issued and when it completed.
 *
 *   seqw DEVICE THREADS BLOCKS PAUSE_US SECONDS LOG
 *
 * Each thread owns the blocks whose number modulo THREADS is its own, so that the versions of a block are written one after the
 * other; a quarter of the writes goes to eight hot blocks. Every 8 bytes of a block are (block << 32 | version), little-endian.
 * LOG: records of u32 block, u32 version, u64 issued, u64 completed (CLOCK_MONOTONIC, ns).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

struct record {
  uint32_t block, version;
  uint64_t issued, completed;
};

enum { MAX_THREADS = 64, MAX_RECORDS = 2000000 };

static int threads, fd, pause_us;
static long blocks;
static double seconds;
static struct record *records[MAX_THREADS];
static long counts[MAX_THREADS];

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what) {
  perror(what);
  exit(1);
}

static void *run(void *argument) {
  long id = (long)argument;
  unsigned seed = id * 7919 + 12345;
  uint64_t *buffer;
  if (posix_memalign((void **)&buffer, 4096, 4096) != 0) die("memory");
  uint32_t *versions = calloc(blocks, sizeof *versions);
  records[id] = malloc(sizeof(struct record) * MAX_RECORDS);
  if (versions == NULL || records[id] == NULL) die("memory");
  uint64_t end = now() + seconds * 1e9;
  while (now() < end && counts[id] < MAX_RECORDS) {
    uint32_t k = rand_r(&seed) % 4 == 0 ? rand_r(&seed) % 8 : rand_r(&seed) % (blocks / threads);
    uint32_t block = k * threads + id;
    uint64_t value = ((uint64_t)block << 32) | ++versions[block];
    for (int i = 0; i < 512; i++) buffer[i] = value;
    struct record *r = &records[id][counts[id]++];
    r->block = block;
    r->version = versions[block];
    r->issued = now();
    if (pwrite(fd, buffer, 4096, (off_t)block * 4096) != 4096) die("write");
    r->completed = now();
    if (pause_us > 0) {
      struct timespec t = {0, (rand_r(&seed) % (2 * pause_us)) * 1000l};
      nanosleep(&t, NULL);
    }
  }
  return NULL;
}

int main(int argc, char **argv) {
  if (argc != 7) {
    fprintf(stderr, "usage: seqw DEVICE THREADS BLOCKS PAUSE_US SECONDS LOG\n");
    return 2;
  }
  fd = open(argv[1], O_WRONLY | O_DIRECT);
  if (fd < 0) die(argv[1]);
  threads = atoi(argv[2]);
  blocks = atol(argv[3]);
  pause_us = atoi(argv[4]);
  seconds = atof(argv[5]);
  if (threads < 1 || threads > MAX_THREADS || blocks / threads < 8) return 2;
  pthread_t ids[MAX_THREADS];
  for (long i = 0; i < threads; i++)
    if (pthread_create(&ids[i], NULL, run, (void *)i) != 0) die("thread");
  for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
  FILE *log = fopen(argv[6], "w");
  if (log == NULL) die(argv[6]);
  for (int i = 0; i < threads; i++)
    if (fwrite(records[i], sizeof(struct record), counts[i], log) != (size_t)counts[i]) die("log");
  if (fclose(log) != 0) die("log");
  return 0;
}
