/**
 * What a test needs of the machine. Where it is missing the test is skipped and says so on stderr, with
 * the reason in its name; with CI=true it fails instead, because there everything can be had.
 */
import { accessSync, constants, existsSync } from 'node:fs';
import { delimiter, join } from 'node:path';
import { describe, it } from 'vitest';

export interface Needs {
  /** Effective user id 0. */
  readonly root?: true;
  /** Programs found in $PATH (or /usr/sbin, /sbin): `losetup`, `mkfs.ext4`. */
  readonly tools?: readonly string[];
  /** Files or devices that must exist: `/dev/loop-control`, `/dev/fuse`. */
  readonly paths?: readonly string[];
  /** Anything else: undefined when it is there, else what is missing. */
  readonly also?: () => string | undefined;
}

/** Absolute path of a program, or undefined. */
export function findTool(name: string): string | undefined {
  const dirs = [...(process.env['PATH'] ?? '').split(delimiter), '/usr/sbin', '/sbin'];
  for (const dir of dirs) {
    const path = join(dir, name);
    try {
      accessSync(path, constants.X_OK);
      return path;
    } catch {
      continue;
    }
  }
  return undefined;
}

/** What of `needs` this machine lacks, in words; undefined when everything is there. */
export function missing(needs: Needs): string | undefined {
  const lacks: string[] = [];
  if (needs.root === true && process.geteuid?.() !== 0) lacks.push('root');
  for (const tool of needs.tools ?? []) if (findTool(tool) === undefined) lacks.push(tool);
  for (const path of needs.paths ?? []) if (!existsSync(path)) lacks.push(path);
  const more = needs.also?.();
  if (more !== undefined) lacks.push(more);
  return lacks.length === 0 ? undefined : lacks.join(', ');
}

type Body = () => void | Promise<void>;

export interface Required {
  /** As vitest's, run only if the machine has what is needed. */
  readonly describe: (name: string, body: () => void) => void;
  readonly it: (name: string, body: Body, timeoutMs?: number) => void;
}

/** `requires({ root: true, tools: ['losetup'] }).describe('…', () => { … })`. */
export function requires(needs: Needs): Required {
  const lack = missing(needs);
  if (lack === undefined) {
    return {
      describe: (name, body) => describe(name, body),
      it: (name, body, timeoutMs) => it(name, body, timeoutMs),
    };
  }
  const ci = process.env['CI'];
  if (ci === 'true' || ci === '1') {
    const fail = (name: string): void =>
      it(name, () => {
        throw new Error(`this machine lacks: ${lack}`);
      });
    return { describe: fail, it: fail };
  }
  const skip = (name: string): void => {
    process.stderr.write(`SKIPPED ${name}: this machine lacks ${lack}\n`);
    it.skipIf(true)(`${name} (lacks ${lack})`, () => undefined);
  };
  return { describe: skip, it: skip };
}
