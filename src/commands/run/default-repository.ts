/** The repository of who has configured none: made at the first need, with a generated key file. */
import { isKind } from '../../errors.js';
import { CONFIG_NAME } from '../../format/names.js';
import { DEFAULT_PARAMETERS, Repository } from '../../repo/repository.js';
import { openStore } from '../../repo/store-url.js';
import { findSecrets } from '../../secrets.js';
import type { CommandContext } from '../spec.js';
import { makeKeyFile } from './init.js';
import { refuseOccupied } from './occupied.js';
import {
  defaultKeyFile,
  environmentOf,
  openRepository,
  secretOf,
  secretPlaces,
} from './session.js';

/**
 * Opens the repository of the settings. Where it is the embedded default and does not exist it is made, and the user is warned where its
 * key is.
 */
export async function openOrMakeRepository(context: CommandContext): Promise<Repository> {
  try {
    return await openRepository(context);
  } catch (error) {
    if (!isKind(error, 'no-repository') || context.settings.repository.origin !== 'default')
      throw error;
  }
  await makeDefault(context);
  return openRepository(context);
}

async function makeDefault(context: CommandContext): Promise<void> {
  const { url } = context.settings.repository;
  const store = await openStore(url, { create: true });
  try {
    // Another one that starts at the same time may be first, here and below.
    if ((await store.stat(CONFIG_NAME)) !== undefined) return;
    await refuseOccupied(store);
    const named = context.settings.credentials.keyFile;
    const keyFile = named ?? defaultKeyFile(context);
    let made = named === undefined ? undefined : await makeKeyFile(context, named);
    let found = await findSecrets(secretPlaces(context));
    if (found.length === 0) {
      made = await makeKeyFile(context, keyFile);
      found = await findSecrets({ keyFile });
    }
    const [first] = found;
    try {
      await Repository.init(
        store,
        DEFAULT_PARAMETERS,
        first === undefined ? undefined : secretOf(first),
        environmentOf(context),
      );
    } catch (error) {
      if (isKind(error, 'exists')) return;
      throw error;
    }
    context.events({
      type: 'note',
      message: `made the repository ${store.url}, encrypted with AES-256-GCM`,
    });
    context.events({
      type: 'warning',
      message:
        made === undefined
          ? `the repository is opened by ${first?.source ?? keyFile}: without it the backup cannot be read`
          : `the key of the repository is in ${made}: without it the backup cannot be read`,
      hint:
        made === undefined
          ? 'Keep a copy on another machine.'
          : `Copy ${made} to another machine now.`,
    });
  } finally {
    await store.close();
  }
}
