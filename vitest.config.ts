import { defineConfig } from 'vitest/config';

/**
 * Three projects. `unit` is pure; `integration` (real loop devices, mounts) and
 * `e2e` (the built program in dist/) make machine-wide things: a test must bear another file's tests beside it. All run in forks,
 * because some count what is open in their process; two workers, because on two cores vitest's own default is one.
 */
const workers = 2;

export default defineConfig({
  test: {
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
