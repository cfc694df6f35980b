import { availableParallelism } from 'node:os';
import { defineConfig } from 'vitest/config';
import { LongestFirst } from './test/support/sequencer.js';

/**
 * Three projects. `unit` is pure; `integration` (real loop devices, mounts) and `e2e` (the built program in
 * dist/) make machine-wide things: a test must bear other files' tests beside it. All run in forks, because
 * some count what is open in their process, and in one pool, one worker more than there are cores: tests of
 * the latter two wait for disks and timers much of their time.
 */
const workers = Number(
  process.env['B2_TEST_WORKERS'] ?? Math.min(4, Math.max(2, availableParallelism() + 1)),
);

export default defineConfig({
  test: {
    sequence: { sequencer: LongestFirst },
    projects: [
      {
        test: {
          name: 'unit',
          include: ['test/unit/**/*.test.{ts,tsx}'],
          pool: 'forks',
          maxWorkers: workers,
          testTimeout: 60_000,
        },
      },
      {
        test: {
          name: 'integration',
          include: ['test/integration/**/*.test.ts'],
          pool: 'forks',
          maxWorkers: workers,
          testTimeout: 300_000,
          hookTimeout: 120_000,
        },
      },
      {
        test: {
          name: 'e2e',
          include: ['test/e2e/**/*.test.ts'],
          pool: 'forks',
          maxWorkers: workers,
          testTimeout: 300_000,
          hookTimeout: 120_000,
        },
      },
    ],
  },
});
