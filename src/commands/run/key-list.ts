import { table } from '../../ui/table.js';
import type { Style } from '../../ui/style.js';
import type { KeyListInput } from '../key-list.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withRepository } from './session.js';

export interface KeyRow {
  readonly id: string;
  readonly kind: string;
  readonly label: string;
  readonly created: string;
  readonly inUse: boolean;
}

export interface KeyListResult {
  readonly repository: string;
  readonly keys: readonly KeyRow[];
}

export function run(
  context: CommandContext,
  _input: KeyListInput,
): Promise<Outcome<KeyListResult>> {
  return withRepository(context, (repo) =>
    Promise.resolve({
      data: {
        repository: repo.id,
        keys: repo.config.keys.map((k) => ({
          id: k.id,
          kind: k.kind === 'scrypt' ? 'password' : k.kind === 'file' ? 'key file' : 'none',
          label: k.label,
          created: k.created,
          inUse: k.id === repo.keyId,
        })),
      },
    }),
  );
}

export function text(data: KeyListResult, style: Style): string {
  return table<KeyRow>(
    [
      { title: '', cell: (k) => (k.inUse ? '*' : ' ') },
      { title: 'ID', cell: (k) => k.id },
      { title: 'KIND', cell: (k) => k.kind },
      { title: 'CREATED', cell: (k) => k.created },
      { title: 'LABEL', cell: (k) => k.label },
    ],
    data.keys,
    style,
    'no keys',
  );
}
